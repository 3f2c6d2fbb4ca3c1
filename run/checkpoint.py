"""Checkpoints: how a run is saved, and how it comes back.

A checkpoint holds tensors and plain containers only, so loading one cannot run code. It is written
aside, flushed and renamed: a kill at any moment leaves a whole one. The one before it is kept, too.
Nothing in it depends on the clock, so equal runs leave equal bytes.
"""

import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from prune import Optimizers
from run import UserError
from run.config import NOT_SAVED, Config
from run.errors import out_of_memory
from run.files import write_whole
from run.hugging_face import load_folder, read_shape

FORMAT = "enlarge-prune 5"
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"


def write_checkpoint(
    c: Config,
    step: int,
    model: GPT,
    optimizers: Optimizers,
    scores: dict[str, Tensor],
    digests: dict[str, str],
) -> None:
    """Save all that the step after `step` depends on, and keep the checkpoint before it. The order
    of the data needs nothing (data/loader.py). digests: of `data`, of its `tokenizer` and of the
    `teacher`. Raises OSError."""
    moments, kept = {}, {p: s for optimizer in optimizers for p, s in optimizer.state.items()}
    for name, p in model.named_parameters():
        if p in kept:
            # Pickle writes a string once per object: interned keys make equal runs equal bytes
            moments[name] = {sys.intern(key): value for key, value in kept[p].items()}
    saved = {
        "format": FORMAT,
        "config": json.dumps({k: v for k, v in vars(c).items() if k not in NOT_SAVED}),
        **digests,
        "model_config": json.dumps(asdict(model.config)),
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": moments,
        "scores": scores,
    }
    path = Path(c.out_dir) / NAME
    write_whole(path, lambda file: torch.save(saved, file), keep=path.with_name(PREVIOUS))


def load_checkpoint(path: Path) -> dict:
    """What write_checkpoint saved, on the CPU; `config` is a dict, `model_config` a GPTConfig.
    Never runs code of the file.

    Raises UserError for a file that is missing, damaged, or not ours; OSError where it cannot be
    read just now.
    """
    before = path.with_name(PREVIOUS)
    way = f"; to go back to the one before it: mv {before} {path}" if before.exists() else ""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint{way}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # compares the checksums, which torch.load does not
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        saved["config"] = json.loads(saved["config"])
        saved["model_config"] = GPTConfig(**json.loads(saved["model_config"]))
        return saved
    except OSError as error:
        raise OSError(f"cannot read {path}: {error}") from error
    except Exception as error:  # torch raises whatever a damaged or foreign file leads it to
        if out_of_memory(error):
            raise OSError(f"cannot read {path}: out of memory") from error
        what = f"{path}: damaged, or not a checkpoint of this version of train.py ({FORMAT})"
        raise UserError(what + way) from error


def is_hugging_face(path: Path) -> bool:
    """Whether this is a Hugging Face folder, and not a checkpoint or a run's folder."""
    return path.is_dir() and not ((path / NAME).exists() or (path / "log.jsonl").exists())


def load_weights(path: Path) -> dict:
    """At least `model` and `model_config` of a run's folder, a checkpoint or a Hugging Face folder.
    Raises UserError, OSError."""
    if is_hugging_face(path):
        return load_folder(path)
    return load_checkpoint(path / NAME if path.is_dir() else path)


def load_shape(path: Path) -> GPTConfig:
    """The shape of what load_weights would load."""
    return read_shape(path) if is_hugging_face(path) else load_weights(path)["model_config"]


def load_model(saved: dict) -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, whatever its widths."""
    model = GPT(saved["model_config"])
    model.load_state_dict(saved["model"])
    return model


def load_optimizers(optimizers: Optimizers, model: GPT, saved: dict) -> None:
    """Give the optimizers what a checkpoint holds of each parameter, by name."""
    name_of, state = {p: name for name, p in model.named_parameters()}, saved["optimizer"]
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]  # as torch counts
        moments = {i: state[name_of[p]] for i, p in enumerate(held) if name_of[p] in state}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
