"""A trained model and the tokenizer that it was trained with, for the tools that use them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from data.tokenizer import Encoding, load_tokenizer
from model import GPT
from run.checkpoint import load_checkpoint, load_model
from run.llama import load_folder


@dataclass
class Run:
    model: GPT  # in eval mode
    tokenizer: Encoding
    tokenizer_name: str  # as load_tokenizer takes it
    vocab_size: int  # logits past it only pad
    end_of_text: int  # a token id
    state: dict  # what the checkpoint or the folder holds


def load_run(path: Path) -> Run:
    """What a run left in its out_dir, or a Hugging Face folder (run/llama.py). The model is on the
    GPU if there is one.

    Raises UserError; DataError, where the data that it was trained on is gone or damaged.
    """
    if (path / "config.json").exists() and not (path / "log.jsonl").exists():
        state, name = load_folder(path), str(path)
        tokenizer = load_tokenizer(name)
        about = (tokenizer, name, tokenizer.n_vocab, tokenizer.eot_token)
    else:
        state = load_checkpoint(path / "checkpoint.pt")
        prepare_shipped(state["config"]["data_dir"])
        data = TokenDataset(state["config"]["data_dir"], "val", context_length=1)
        about = (load_tokenizer(data.tokenizer), data.tokenizer, data.vocab_size, data.end_of_text)
    model = load_model(state | {"path": path})
    return Run(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), *about, state)
