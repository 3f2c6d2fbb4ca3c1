"""What a run left, and what a run would do, for the tools that look at them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from data.tokenizer import Encoding, load_tokenizer
from model import GPT
from run import UserError
from run.checkpoint import NAME, is_hugging_face, load_checkpoint, load_model, load_shape
from run.config import Config, take_shape
from run.cost import Plan, make_plan
from run.hugging_face import load_folder


@dataclass
class Trained:
    """A trained model, and the tokenizer that it was trained with."""

    model: GPT  # in eval mode
    tokenizer: Encoding
    tokenizer_name: str  # as load_tokenizer takes it
    vocab_size: int  # logits past it only pad
    end_of_text: int  # a token id
    state: dict  # what the checkpoint or the folder holds


def load_trained(path: Path) -> Trained:
    """What a run left in its out_dir, or a Hugging Face folder; on the GPU if there is one. Raises
    UserError; DataError, where the data that it was trained on is gone or damaged."""
    if is_hugging_face(path):
        state, name = load_folder(path), str(path)
        tokenizer = load_tokenizer(name)
        ids, known = tokenizer.n_vocab, state["model_config"].vocab_size
        if ids > known:
            raise UserError(f"{path}: its tokenizer has {ids} ids, its model knows {known}")
        about = (tokenizer, name, ids, tokenizer.eot_token)
    else:
        state = load_checkpoint(path / NAME)
        data_dir = state["config"]["data_dir"]
        prepare_shipped(data_dir)
        data = TokenDataset(data_dir, "val", context_length=1)
        if state["data"] != data.digest:
            raise UserError(f"{path}: was trained on other data than {data_dir} holds now")
        about = (load_tokenizer(data.tokenizer), data.tokenizer, data.vocab_size, data.end_of_text)
    model = load_model(state)
    return Trained(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), *about, state)


def load_plan(c: Config, missing: int = 0) -> tuple[Config, Plan]:
    """The config as train.py would run it, and its plan. missing: the vocabulary to assume where
    the data is not there yet; with 0, that raises DataError. Raises UserError."""
    prepare_shipped(c.data_dir)
    shape, teacher = (load_shape(Path(path)) if path else None for path in (c.init_from, c.teacher))
    if missing and not (Path(c.data_dir) / "meta.json").exists():
        vocab_size = shape.vocab_size if shape else missing
    else:
        vocab_size = TokenDataset(c.data_dir, "train", c.context_length).vocab_size
    c = take_shape(c, shape, vocab_size) if shape else c
    return c, make_plan(c, vocab_size, teacher)
