"""What you do with a run. Each module here is a command: python -m tools.NAME --help

This file holds what the commands share: types of arguments, the log of a run, and the
model that a run trained.
"""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch's import: see train.py

import torch

from configs import read_log as read_log  # the commands share it, too
from data.command import UserError
from data.tokenizer import Encoding, load_tokenizer, tokenizer_digest
from model import GPT, load_checkpoint


def expanded(text: str) -> Path:
    """The type of an argument that is a path. No shell expands the ~ of --out=~/x."""
    if not text:
        raise ArgumentTypeError("is empty")
    return Path(os.path.expanduser(text))


def number(kind: type, least: float, most: float = 2**63 - 1) -> Callable:
    """The type of an argument that is an int or a float from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise ArgumentTypeError(f"{text!r} is not from {least} to {most}")
        return value

    return read


positive = number(int, 1)


def run_name(out_dir: Path) -> str:
    """The name of a run in a picture: its folder. A seed's folder also has its arm."""
    parts = out_dir.resolve().parts
    if parts[-1].isdigit():
        return "/".join(parts[-2:])
    return parts[-1]


@dataclass
class Trained:
    model: GPT  # in eval mode, on the GPU if there is one
    tokenizer: Encoding
    tokenizer_name: str  # for load_tokenizer


def load_trained(path: Path) -> Trained:
    """The model and the tokenizer of a run's folder or a checkpoint.pt.

    Raises UserError if the checkpoint is missing or damaged, or its tokenizer changed.
    """
    checkpoint = load_checkpoint(path)
    name = checkpoint["tokenizer"]
    tokenizer = load_tokenizer(name)
    if tokenizer_digest(name) != checkpoint["tokenizer_digest"]:
        raise UserError(f"{path}: its tokenizer {name} is not the one it began with")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT.from_checkpoint(checkpoint).to(device).eval()
    return Trained(model, tokenizer, name)
