"""What a run leaves in its out_dir, and how it comes back: config.json, log.jsonl, checkpoint.pt.

A checkpoint holds tensors and plain containers only, so loading one cannot run code. It is written
aside, flushed and renamed, and the one before is kept: a kill at any moment leaves a whole one, and
a checksum tells a damaged one. Nothing in it depends on the clock, so equal runs leave equal bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shlex
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from torch import Tensor

from model import GPT, GPTConfig
from run.config import Config

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no lock, two runs in one out_dir are the user's to avoid
    fcntl = None

FORMAT = "enlarge-prune 1"
PREVIOUS = "checkpoint.prev.pt"
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pt", PREVIOUS)
# What a resumed run may change: it moves the weights by no more than rounding (device, compile,
# micro batches), or only says what to do with a step that is not finite.
NOT_SAVED = {"out_dir", "resume", "overwrite", "stop_after", "tensorboard", "wandb_project"}
NOT_SAVED |= {"match_flops"}  # max_steps is what it came to
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from", "micro_batch_size", "on_nonfinite"}
MAY_CHANGE |= {"recompute", "shard_optimizer", "rank_timeout"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "log_every"}

# What reading a damaged or foreign file can raise.
DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError)
DAMAGE += (LookupError, ValueError, TypeError, zipfile.BadZipFile)


class CheckpointError(Exception):
    """One line for a person: which file or folder, what is wrong with it, what to do."""


def write_whole(path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Fill a file by `write(file)` so that a kill leaves the old content or the new, never a part.

    `keep` is where the old file goes, just before the new one takes its place.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        hidden = error.__context__  # torch.save ends in a RuntimeError of its own
        raise hidden if isinstance(hidden, OSError) else OSError(f"{path}: {error}") from error
    if os.name == "posix":  # a rename is durable once the folder is flushed
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def checksum(state: dict) -> str:
    """sha256 over names, values, dtypes, shapes and bytes: what a flipped bit cannot keep."""
    sha = hashlib.sha256()

    def feed(x: object) -> None:
        if isinstance(x, dict):
            for key, value in x.items():
                feed(key)
                feed(value)
        elif isinstance(x, Tensor):
            sha.update(f"{x.dtype} {tuple(x.shape)}".encode())
            sha.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            sha.update(repr(x).encode())

    feed(state)
    return sha.hexdigest()


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint; the one before it is kept as checkpoint.prev.pt."""
    state = state | {"checksum": checksum(state)}
    write_whole(path, lambda file: torch.save(state, file), keep=path.with_name(PREVIOUS))


def save_checkpoint(
    path: Path,
    config: Config,
    model: GPT,
    moments: dict[str, dict[str, Tensor]],
    scaler: torch.amp.GradScaler,
    scores: dict[str, Tensor],
    progress: dict[str, int],
) -> None:
    """Save all that the next step depends on. The order of the data needs none (data/loader.py).

    moments: parameter name -> AdamW state. progress: step, tokens, flops and skipped so far.
    """
    state = {
        "format": FORMAT,
        "config": json.dumps({k: v for k, v in vars(config).items() if k not in NOT_SAVED}),
        "model_config": json.dumps(dataclasses.asdict(model.shape())),
        **progress,
        "model": dict(model.state_dict()),
        "optimizer": {
            # Pickle writes a string once per object: interned keys make equal runs equal bytes.
            name: {sys.intern(key): value for key, value in moments[name].items()}
            for name, _ in model.named_parameters()
            if name in moments
        },
        "scaler": scaler.state_dict(),
        "scores": scores,
    }
    write_checkpoint(path, state)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, its `config` and `model_config` as a dict and a GPTConfig.

    Raises CheckpointError for a file that is missing, damaged, or not one of ours, and says what
    the one before it is worth. Never runs its code.
    """
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        before = path.with_name(PREVIOUS)
        if path.name != "checkpoint.pt" or not before.exists():
            raise
        try:
            step = read_checkpoint(before)["step"]
        except CheckpointError as other:
            raise CheckpointError(f"{error}; {other}") from error
        way = f"python train.py {shlex.quote(str(path.parent))} --resume"
        raise CheckpointError(
            f"{error}; the one before it, {before}, step {step}, is whole: {way} goes on from it"
        ) from error


def read_checkpoint(path: Path) -> dict:
    """load_checkpoint, of this file alone."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch packs nothing: a bomb is as large as it is
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(state, dict) and state.get("format") == FORMAT
        if ours:
            if state.pop("checksum") != checksum(state):
                raise ValueError("the checksum differs")
            state["config"] = json.loads(state["config"])
            state["model_config"] = GPTConfig(**json.loads(state["model_config"]))
    except DAMAGE as error:
        raise CheckpointError(f"{path}: not a checkpoint of train.py, or damaged") from error
    if not ours:
        raise CheckpointError(f"{path}: not a checkpoint of this version of train.py ({FORMAT})")
    return state


def check_finite(state: dict, path: Path) -> None:
    """Refuse weights of which nothing can come. Raises CheckpointError."""
    for name, weight in state["model"].items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: its weights are not finite ({name}); take another")


def load_model(state: dict) -> GPT:
    """The model of a checkpoint, whatever its widths. Raises CheckpointError if they disagree."""
    model = GPT(state["model_config"])
    try:
        model.load_state_dict(state["model"], strict=True)
    except DAMAGE as error:
        raise CheckpointError(f"the checkpoint's weights do not fit its shape: {error}") from error
    return model


def load_optimizer(optimizer: torch.optim.Optimizer, model: GPT, state: dict) -> None:
    """Give the optimizer the moments that a checkpoint holds for each parameter name."""
    name_of = {p: name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]  # as torch counts
    saved = state["optimizer"]  # without those that no step has updated yet
    moments = {i: saved[name_of[p]] for i, p in enumerate(held) if name_of[p] in saved}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def check_same_run(config: Config, state: dict) -> None:
    """Refuse to go on with a config that contradicts the checkpoint's. Raises CheckpointError."""
    now, then = dataclasses.asdict(config), state["config"]
    changed = [k for k in now if k not in MAY_CHANGE and now[k] != then.get(k)]
    if changed:
        what = ", ".join(f"{k}={then.get(k)!r} there, {now[k]!r} here" for k in changed)
        path = Path(config.out_dir) / "checkpoint.pt"
        raise CheckpointError(f"{path}: another run's checkpoint ({what}); choose another out_dir")


def find_checkpoint(config: Config) -> dict | None:
    """The checkpoint to go on from and the `path` of its file, or None for a fresh start. Raises
    CheckpointError where out_dir is not a folder, or holds a run that the config neither resumes
    nor overwrites, or only damaged checkpoints. Writes nothing.
    """
    folder = Path(config.out_dir)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(
            f"out_dir={config.out_dir}: cannot write in {nearest}; choose another"
        )
    saved = [folder / name for name in ("checkpoint.pt", PREVIOUS) if (folder / name).exists()]
    damaged = []
    for path in saved if config.resume else []:
        try:
            state = read_checkpoint(path) | {"path": path}
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"{damaged[0]}; going on from {path}, step {state['step']}", file=sys.stderr)
        return state
    if damaged:
        raise CheckpointError("; ".join(damaged))
    held = [name for name in RUN_FILES if (folder / name).exists()]
    if held and not (config.overwrite or config.resume):
        raise CheckpointError(
            f"out_dir={config.out_dir}: holds a run; --resume goes on with it, --overwrite "
            "replaces it, --out_dir=FOLDER writes elsewhere"
        )
    return None


def open_out_dir(config: Config, step: int, found: Path | None) -> "Log":
    """Make the folder of a run that starts, or goes on, after `step`, from the checkpoint `found`.
    Raises CheckpointError, also where another process runs there: its lock is the system's, and
    ends with it however it ends.
    """
    folder = Path(config.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if found:  # in the place of a damaged one, which the next save would keep
            os.replace(found, folder / "checkpoint.pt")
        else:
            for name in ("checkpoint.pt", PREVIOUS):
                (folder / name).unlink(missing_ok=True)
        write_text(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        return Log(folder, step, lock)
    except BlockingIOError as error:
        message = f"out_dir={config.out_dir}: another process is running there; choose another"
        raise CheckpointError(message) from error
    except OSError as error:
        raise CheckpointError(f"out_dir={config.out_dir}: cannot write there: {error}") from error


def is_running(folder: Path) -> bool:
    """Whether a process holds the lock of this out_dir."""
    if not fcntl or not (folder / "lock").exists():
        return False
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


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


class Log:
    """log.jsonl: one JSON object a line, written at once. Opening it drops what came after `step`,
    the steps that the resumed run does again; `seconds` is the time that those before it took.
    What a full disk does not take is written with a later line. Holds the out_dir's lock.
    """

    def __init__(self, folder: Path, step: int, lock: TextIO):
        events = read_log(folder) if step else []
        kept = [e for e in events if e["step"] <= step and e["event"] != "done"]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        path = folder / "log.jsonl"
        write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        self.lock, self.file = lock, open(path, "ab", buffering=0)  # noqa: SIM115
        self.waiting = b""

    def write(self, event: str, **values) -> None:
        self.waiting += json.dumps({"event": event, **values}).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def close(self) -> None:
        self.file.close()
        self.lock.close()
