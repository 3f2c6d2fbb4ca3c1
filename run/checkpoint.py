"""Checkpoints: how a run is saved, and how it comes back.

A checkpoint holds tensors and plain containers only, so loading one cannot run code. It is written
aside, flushed and renamed, and the one before is kept: a kill at any moment leaves a whole one.
Nothing in it depends on the clock, so equal runs leave equal bytes.
"""

import json
import os
import shlex
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model import GPT, GPTConfig
from prune import Optimizers
from run import UserError
from run.config import NOT_SAVED, Config

FORMAT = "enlarge-prune 3"
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"


def write_whole(path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Fill a file by `write(file)` so that a kill leaves the old content or the new, never a part.

    `keep` is where the old file goes, just before the new one takes its place. Raises OSError.
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
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # now the rename is durable
    os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def save_checkpoint(
    c: Config, step: int, model: GPT, optimizers: Optimizers, scores: dict[str, Tensor]
) -> None:
    """Save all that the step after `step` depends on, and keep the checkpoint before it. The order
    of the data needs nothing (data/loader.py). Raises OSError."""
    moments, kept = {}, {p: s for optimizer in optimizers for p, s in optimizer.state.items()}
    for name, p in model.named_parameters():
        if p in kept:
            # Pickle writes a string once per object: interned keys make equal runs equal bytes
            moments[name] = {sys.intern(key): value for key, value in kept[p].items()}
    state = {
        "format": FORMAT,
        "config": json.dumps({k: v for k, v in vars(c).items() if k not in NOT_SAVED}),
        "model_config": json.dumps(asdict(model.config)),
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": moments,
        "scores": scores,
    }
    path = Path(c.out_dir) / NAME
    write_whole(path, lambda file: torch.save(state, file), keep=path.with_name(PREVIOUS))


def read_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU, its `config` and `model_config` as a dict and a GPTConfig, and its
    `path`. Never runs its code. Raises UserError for a file that is missing, damaged, or not ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # compares the checksums, which torch.load does not
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(state, dict) and state.get("format") == FORMAT
        if ours:
            state["config"] = json.loads(state["config"])
            state["model_config"] = GPTConfig(**json.loads(state["model_config"]))
            state["path"] = path
    except Exception as error:  # torch raises whatever a damaged or foreign file leads it to
        raise UserError(f"{path}: not a checkpoint of train.py, or damaged") from error
    if not ours:
        raise UserError(f"{path}: not a checkpoint of this version of train.py ({FORMAT})")
    return state


def load_checkpoint(path: Path) -> dict:
    """Like read_checkpoint. If the file is damaged, the error also tells of the one before it."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        before = path.with_name(PREVIOUS)
        if path.name != NAME or not before.exists():
            raise
        try:
            step = read_checkpoint(before)["step"]
            way = f"python train.py {shlex.quote(str(path.parent))} --resume goes on from it"
            other = f"the one before it, {before}, step {step}, is whole: {way}"
        except UserError as also:
            other = also
        raise UserError(f"{error}; {other}") from error


def load_model(state: dict) -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, whatever its widths. Raises UserError
    where they disagree with the weights, or a weight is not finite."""
    model = GPT(state["model_config"])
    try:
        model.load_state_dict(state["model"], strict=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its shape: {error}") from error
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{state['path']}: its weights are not finite ({name}); take another")
    return model


def load_optimizers(optimizers: Optimizers, model: GPT, state: dict) -> None:
    """Give the optimizers what a checkpoint holds of each parameter, by name."""
    name_of, saved = {p: name for name, p in model.named_parameters()}, state["optimizer"]
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]  # as torch counts
        moments = {i: saved[name_of[p]] for i, p in enumerate(held) if name_of[p] in saved}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
