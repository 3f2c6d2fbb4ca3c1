"""What you do with a run. Each module here is a command: python -m tools.NAME --help. Here is what
they share: types of arguments, what a run left, and what a run would do."""

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch's import: see train.py

import torch

from data.command import UserError
from data.loader import TokenDataset
from data.tokenizer import Encoding, load_tokenizer
from model import GPT
from run.checkpoint import load_model, load_weights, tokenizer_of
from run.config import Config, take_shape
from run.cost import Plan


def expanded(text: str) -> Path:
    """The type of an argument that is a path. No shell expands the ~ of --out=~/x."""
    if not text:
        raise ArgumentTypeError("is empty")
    return Path(os.path.expanduser(text))


def name_of(out_dir: Path) -> str:
    """What a picture calls a run: its folder, and that of the arm where it is a seed's."""
    parts = out_dir.resolve().parts
    return "/".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def number(kind: type, least: float, most: float = 2**63 - 1) -> Callable[[str], float]:
    """The type of an argument that is an int or a float from `least` to `most`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ArgumentTypeError(f"{text!r} is not from {least} to {most}")

    return read


positive = number(int, 1)


def filled(frame: str, mark: str, data: object) -> str:
    """The HTML of a frame of this folder, with data for its script in place of the mark."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no word ends a script
    return (Path(__file__).parent / frame).read_text(encoding="utf-8").replace(mark, text)


@dataclass
class Trained:
    model: GPT  # in eval mode
    tokenizer: Encoding
    tokenizer_name: str  # as load_tokenizer takes it


def load_trained(path: Path) -> Trained:
    """The model of a run's folder, a checkpoint.pt or a Hugging Face folder; on the GPU if there is
    one. Raises UserError, also where the data that it was trained on is gone or damaged."""
    saved = load_weights(path)
    name = tokenizer_of(saved, path)
    tokenizer, known = load_tokenizer(name), saved["model_config"].vocab_size
    if (ids := tokenizer.n_vocab) > known:
        raise UserError(f"{path}: its tokenizer has {ids} ids, its model knows {known}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(load_model(saved, torch.device(device)).eval(), tokenizer, name)


def load_plan(c: Config, missing: int = 0) -> tuple[Config, Plan]:
    """The config as train.py would run it, and its plan. missing: the vocabulary to assume where
    the data is not there yet; with 0, that raises UserError, as an impossible config does."""
    given = (load_weights(Path(p), only_shape=True) if p else {} for p in (c.init_from, c.teacher))
    shape, teacher = (weights.get("model_config") for weights in given)
    try:
        vocab_size = TokenDataset(c.data_dir, "train", c.context_length).vocab_size
    except UserError:
        if not missing or (Path(c.data_dir) / "meta.json").exists():
            raise
        vocab_size = shape.vocab_size if shape else missing
    c = take_shape(c, shape, vocab_size) if shape else c
    return c, Plan(c, vocab_size, teacher)
