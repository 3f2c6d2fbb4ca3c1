"""What a run left, and what a run would do, for the tools that look at them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from data.tokenizer import Encoding, load_tokenizer
from model import GPT
from run import UserError
from run.checkpoint import load_model, load_shape, load_weights, tokenizer_of
from run.config import Config, take_shape
from run.cost import Plan


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
    the data is not there yet; with 0, that raises UserError."""
    prepare_shipped(c.data_dir)
    shape, teacher = (load_shape(Path(path)) if path else None for path in (c.init_from, c.teacher))
    if missing and not (Path(c.data_dir) / "meta.json").exists():
        vocab_size = shape.vocab_size if shape else missing
    else:
        vocab_size = TokenDataset(c.data_dir, "train", c.context_length).vocab_size
    c = take_shape(c, shape, vocab_size) if shape else c
    return c, Plan(c, vocab_size, teacher)
