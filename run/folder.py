"""What a run leaves in its out_dir (config.json, log.jsonl, checkpoint.pt), and where it starts."""

import contextlib
import fcntl
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from run import UserError
from run.checkpoint import NAME, PREVIOUS, load_checkpoint, read_checkpoint, write_text
from run.config import NOT_SAVED, SHAPE, Config, take_shape
from run.llama import load_folder

RUN_FILES = ("config.json", "log.jsonl", NAME, PREVIOUS)
# Knobs that a resumed run may change: they change the weights by rounding at most.
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from", "micro_batch_size", "recompute"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "log_every"}


def find_start(c: Config, vocab_size: int) -> tuple[Config, dict | None]:
    """Returns the config, with the shape of the weights found, and the state to start from: the
    checkpoint in out_dir, the weights of `init_from`, or None. Writes nothing. vocab_size: that of
    the data, padded.

    Raises UserError where out_dir cannot be written, holds another run, or one that the config
    neither resumes nor overwrites.
    """
    folder, state = Path(c.out_dir), None
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"out_dir={c.out_dir}: cannot write in {nearest}; choose another")
    damaged = []
    for path in (folder / NAME, folder / PREVIOUS) if c.resume else ():
        if path.exists() and not state:
            try:
                state = read_checkpoint(path)
            except UserError as error:
                damaged.append(str(error))
    if damaged and not state:
        raise UserError("; ".join(damaged))
    if damaged:
        here = f"going on from {state['path']}, step {state['step']}"
        print(f"{damaged[0]}; {here}", file=sys.stderr)
    if state:
        if c.init_from:  # the shape that it gave then; the checkpoint may be narrower by now
            c = replace(c, **{key: state["config"][key] for key in SHAPE})
        check_same_run(c, state)
    elif any((folder / name).exists() for name in RUN_FILES) and not (c.overwrite or c.resume):
        way = "--resume goes on with it, --overwrite replaces it, --out_dir=FOLDER writes elsewhere"
        raise UserError(f"out_dir={c.out_dir}: holds a run; {way}")
    elif c.init_from:
        path = Path(c.init_from)
        state = load_folder(path) if path.is_dir() else load_checkpoint(path)
        c = take_shape(c, state["model_config"], vocab_size)
        shape = replace(state["model_config"], context_length=c.context_length)
        weights = {"model": state["model"], "model_config": shape, "path": path}
        state = weights | {"step": 0, "optimizer": {}, "scores": {}}
    return c, state


def check_same_run(c: Config, state: dict) -> None:
    """Refuse to go on with a config that contradicts the checkpoint's. Raises UserError."""
    now, then = vars(c), state["config"]
    changed = [key for key in now if key not in MAY_CHANGE and now[key] != then.get(key)]
    if changed:
        what = ", ".join(f"{k}={then.get(k)!r} there, {now[k]!r} here" for k in changed)
        path = Path(c.out_dir) / NAME
        raise UserError(f"{path}: another run's checkpoint ({what}); choose another out_dir")


class Folder:
    """The out_dir of a run that goes on after `step`, from the file `found`; and its log.

    Holds a lock, the system's, which ends with the process however that ends. log.jsonl gets a JSON
    object a line; opening it drops the lines of steps that a resumed run does again. `seconds`: the
    time that the steps before took. Raises UserError where another process runs there, or nothing
    can be written.
    """

    def __init__(self, c: Config, step: int, found: Path | None):
        folder = Path(c.out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "w")  # noqa: SIM115
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if step and found.name == PREVIOUS:  # so that no save keeps the damaged one
                if (folder / NAME).exists():
                    os.replace(folder / NAME, folder / "checkpoint.damaged.pt")
                os.replace(found, folder / NAME)
            elif step == 0:
                for name in (NAME, PREVIOUS):
                    (folder / name).unlink(missing_ok=True)
            write_text(folder / "config.json", json.dumps(asdict(c), indent=1))
            events = read_log(folder) if step else []
            kept = [e for e in events if e["step"] <= step and e["event"] != "done"]
            self.seconds = kept[-1]["seconds"] if kept else 0.0
            path = folder / "log.jsonl"
            write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
            self.file, self.unwritten = open(path, "ab", buffering=0), b""  # noqa: SIM115
        except BlockingIOError as error:
            what = "another process is running there; choose another"
            raise UserError(f"out_dir={c.out_dir}: {what}") from error
        except OSError as error:
            raise UserError(f"out_dir={c.out_dir}: cannot write there: {error}", 1) from error

    def write(self, event: dict) -> None:
        """Write a line at once. If the disk is full, keep it and try again with the next one."""
        self.unwritten += json.dumps(event).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def read_log(folder: Path) -> list[dict]:
    """The events of a run so far, in order; [] where there is no log. A kill or a full disk may
    have cut a line: it is left out.
    """
    path, events = folder / "log.jsonl", []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                whole = isinstance(event, dict) and {"event", "seconds"} <= event.keys()
                if whole and isinstance(event.get("step"), int):
                    events.append(event)
    return events
