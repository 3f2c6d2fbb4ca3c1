"""What a run leaves in its out_dir (config.json, log.jsonl, checkpoint.pt), and where it starts."""

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from filelock import lock_descriptor  # from 3.30 on: a lock that never changes the file

from data.loader import TokenDataset
from run import UserError
from run.checkpoint import NAME, PREVIOUS, load_checkpoint
from run.config import NOT_SAVED, SHAPE, Config, check_config
from run.cost import make_plan
from run.files import write_text
from run.ranks import Ranks
from run.teacher import Teacher

NUMBERS = ("step", "tokens", "flops", "seconds")  # of every event in the log
RUN_FILES = ("config.json", "log.jsonl", NAME, PREVIOUS)
# Knobs that a resumed run may change: they change the weights by rounding at most.
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from", "micro_batch_size", "recompute"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "log_every", "teacher"}


class Folder:
    """The out_dir of a run. Rank 0 locks it before anything is read, and alone writes there.

    The lock is the system's: it ends with the process, however that ends. Raises UserError where
    another process runs there, or nothing can be written.
    """

    def __init__(self, out_dir: str, ranks: Ranks, data: TokenDataset, teacher: Teacher | None):
        self.path, self.ranks, self.main = Path(out_dir), ranks, ranks.rank == 0
        self.vocab_size = data.vocab_size
        self.digests = {"data": data.digest, "tokenizer": data.tokenizer_digest}
        self.digests["teacher"] = teacher.digest if teacher else ""
        if not self.main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "ab")  # noqa: SIM115 (also a file of the user's)
        except OSError as error:
            raise UserError(f"out_dir={out_dir}: cannot write there: {error}") from error
        try:
            ours = lock_descriptor(self.lock.fileno(), blocking=False)
        except OSError:  # some network disks have none
            ours, what = True, "its disk has no locks; start no second run there"
            print(f"out_dir={out_dir}: {what}", file=sys.stderr)
        if not ours:
            what = "another process is running there; choose another"
            raise UserError(f"out_dir={out_dir}: {what}")

    def resumes(self, c: Config) -> bool:
        """Whether the run goes on from a checkpoint that is here.

        Raises UserError where the run would write over what it may not: a run that the config
        neither resumes nor overwrites, the weights that it learns from, files of another program
        under our names.
        """
        own = [(self.path / name).resolve() for name in ("", NAME, PREVIOUS)]
        for key in ("init_from", "teacher"):
            if getattr(c, key) and Path(getattr(c, key)).resolve() in own:
                what = "the run would write over it; choose another out_dir"
                raise UserError(f"{key}={getattr(c, key)!r}: {what}")
        found, what = [name for name in RUN_FILES if (self.path / name).exists()], ""
        config = self.path / "config.json"  # a run writes it before all else, and never removes it
        saves = NAME in found or PREVIOUS in found
        if found and not (config.exists() and b'"max_steps"' in config.read_bytes()):
            what = f"holds {found[0]}, but no config.json of a run; choose another out_dir"
        elif found and not (c.overwrite or c.resume):
            way = "--resume goes on with it, --overwrite replaces it, --out_dir=F writes elsewhere"
            what = f"holds a run; {way}"
        elif c.resume and not saves:
            log = read_log(self.path)
            if any(e["event"] == "save" and "error" not in e for e in log):
                what = "holds a run whose checkpoint is gone; remove the folder to begin again"
        if what:
            raise UserError(f"out_dir={c.out_dir}: {what}")
        return c.resume and saves

    def load(self, c: Config) -> tuple[Config, dict]:
        """The config, with the shape that the run began with, and the checkpoint. Raises UserError
        where that is of another config, of other data or with another teacher."""
        path = self.path / NAME
        saved = load_checkpoint(path)
        if c.init_from:  # the shape that it gave then; the checkpoint may be narrower by now
            c = replace(c, **{key: saved["config"][key] for key in SHAPE})
            check_config(c)
        check_same_run(c, saved, self.digests)
        shape, planned = saved["model_config"], make_plan(c, self.vocab_size).shape(saved["step"])
        if shape != replace(planned, rope_theta=shape.rope_theta, norm_eps=shape.norm_eps):
            raise UserError(f"{path}: its shape is not that of step {saved['step']}")
        return c, saved

    def open_log(self, c: Config, step: int) -> None:
        """Write config.json, and drop from log.jsonl what a run that goes on after `step` does
        again. `seconds`: the time that the steps before took."""
        self.seconds, self.unwritten = 0.0, b""
        if not self.main:
            return
        if step == 0:
            for name in (NAME, PREVIOUS, "log.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.path / "config.json", json.dumps(asdict(c), indent=1))
        events = read_log(self.path) if step else []
        kept = [e for e in events if e["step"] <= step and e["event"] != "done"]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        write_text(self.path / "log.jsonl", "".join(json.dumps(event) + "\n" for event in kept))
        self.file = open(self.path / "log.jsonl", "ab", buffering=0)  # noqa: SIM115

    def write(self, event: dict) -> None:
        """Add a line to the log at once. If the disk is full, keep it for the next call."""
        if self.main:
            self.unwritten += json.dumps(event).encode() + b"\n"
            with contextlib.suppress(OSError):
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def check_same_run(c: Config, saved: dict, digests: dict[str, str]) -> None:
    """Raises UserError where the config, the data or the teacher contradict the checkpoint."""
    now, then, path = vars(c), saved["config"], Path(c.out_dir) / NAME
    changed = [key for key in now if key not in MAY_CHANGE and now[key] != then[key]]
    if changed:
        what = ", ".join(f"{k}={then[k]!r} there, {now[k]!r} here" for k in changed)
        raise UserError(f"{path}: another run's checkpoint ({what}); choose another out_dir")
    for key, where in (("data", "data_dir"), ("tokenizer", "data_dir"), ("teacher", "teacher")):
        if saved[key] != digests[key]:
            what = f"{where}={getattr(c, where)} is not the {key} that the run began with"
            raise UserError(f"{path}: {what}; put that back, or choose another out_dir")


def read_log(folder: Path) -> list[dict]:
    """The events of a run so far, in order; [] where there is no log. A kill may have cut the last
    line: it is left out. Raises UserError for another that is no event."""
    path, events = folder / "log.jsonl", []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
            kinds = {key: type(events[-1][key]) for key in ("event", *NUMBERS)}
        except (ValueError, LookupError, TypeError, RecursionError):
            kinds = {}
        if kinds.pop("event", None) is not str or not set(kinds.values()) <= {int, float}:
            raise UserError(f"{path}: line {number} is damaged, or no event of a run; remove it")
    return events
