"""What a run leaves in its out_dir, and how it comes back: config.json, log.jsonl, checkpoint.pt.

A checkpoint holds tensors and plain containers only, so loading one cannot run code. It is written
aside, flushed and renamed: a kill at any moment leaves the old one or the new one, whole. Nothing
in it depends on the clock, so two equal runs leave equal bytes.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from model import GPT, GPTConfig

FORMAT = "enlarge-prune 1"
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pt")
# What a resumed run may change: nothing here has a say in the weights it ends with.
NOT_SAVED = {"out_dir", "resume", "overwrite", "stop_after"}
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "log_every", "stop_after"}


# What reading a damaged or foreign file can raise.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
)


class CheckpointError(Exception):
    """One line for a person: which file or folder, what is wrong with it, what to do."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves either the old content or the new, never a part."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is durable once the folder is flushed
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(
    path: Path,
    config: Config,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    scores: dict[str, Tensor],
    progress: dict[str, int],
) -> None:
    """Save all that the next step depends on. The order of the data needs no state
    (data/loader.py).

    progress: step, tokens and flops so far. Optimizer state is keyed by parameter name.
    """
    state = {
        "format": FORMAT,
        "config": json.dumps({k: v for k, v in vars(config).items() if k not in NOT_SAVED}),
        "model_config": json.dumps(dataclasses.asdict(model.shape())),
        **progress,
        "model": dict(model.state_dict()),
        "optimizer": {
            # Pickle writes a string once per object: interned keys make equal runs equal bytes.
            name: {sys.intern(key): value for key, value in optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in optimizer.state
        },
        "scaler": scaler.state_dict(),
        "scores": scores,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, its `config` and `model_config` as a dict and a GPTConfig.

    Raises CheckpointError for a file that is missing, damaged, or not one of ours. Never runs its
    code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(state, dict) and state.get("format") == FORMAT
        if ours:
            state["config"] = json.loads(state["config"])
            state["model_config"] = GPTConfig(**json.loads(state["model_config"]))
    except DAMAGE as error:
        raise CheckpointError(f"{path}: not a checkpoint of train.py, or damaged") from error
    if not ours:
        raise CheckpointError(f"{path}: not a checkpoint of this version of train.py ({FORMAT})")
    return state


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
    held = [
        p for group in optimizer.param_groups for p in group["params"]
    ]  # torch counts in this order
    moments = {i: state["optimizer"][name_of[p]] for i, p in enumerate(held)}
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
    """The checkpoint to go on from, or None for a fresh start. Raises CheckpointError where
    out_dir is not a folder, or holds a run that the config neither resumes nor overwrites. Writes
    nothing.
    """
    folder = Path(config.out_dir)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(
            f"out_dir={config.out_dir}: cannot write in {nearest}; choose another"
        )
    path = folder / "checkpoint.pt"
    if config.resume and path.exists():
        return load_checkpoint(path)
    held = [name for name in RUN_FILES if (folder / name).exists()]
    if held and not (config.overwrite or config.resume):
        raise CheckpointError(
            f"out_dir={config.out_dir}: holds a run; --resume goes on with it, --overwrite "
            "replaces it, --out_dir=FOLDER writes elsewhere"
        )
    return None


def open_out_dir(config: Config, step: int) -> "Log":
    """Make the folder of a run that starts, or goes on, after `step`. Raises CheckpointError."""
    folder = Path(config.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        text = json.dumps(dataclasses.asdict(config), indent=1)
        write_whole(folder / "config.json", text.encode())
        return Log(folder / "log.jsonl", step)
    except OSError as error:
        raise CheckpointError(f"out_dir={config.out_dir}: cannot write there: {error}") from error


class Log:
    """log.jsonl: one JSON object a line, written at once. Opening it drops what came after `step`,
    the steps that the resumed run does again; `seconds` is the time that those before it took.
    """

    def __init__(self, path: Path, step: int):
        kept, self.seconds = [], 0.0
        if step and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a kill cuts lines
                    event = json.loads(line)
                    if event["step"] <= step and event["event"] != "done":
                        kept.append(line)
                        self.seconds = event["seconds"]
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, event: str, **values) -> None:
        self.file.write(json.dumps({"event": event, **values}) + "\n")
        self.file.flush()
