"""A trained model and the tokenizer that it was trained with, for the tools that use them."""

from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from checkpoint import load_checkpoint, load_model
from config import Config, model_config
from data.loader import TokenDataset
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig


@dataclass
class Run:
    """`vocab_size`: logits past it only pad. `end_of_text`: a token id. `enlarged`: the shape that
    the run started from.
    """

    model: GPT
    tokenizer: tiktoken.Encoding
    vocab_size: int
    end_of_text: int
    enlarged: GPTConfig


def load_run(path: Path) -> Run:
    """What a run left in its out_dir, the model on the GPU if there is one, and in eval mode.

    Raises CheckpointError; DataError, where the folder that it was trained on is gone or damaged.
    """
    state = load_checkpoint(path / "checkpoint.pt")
    data = TokenDataset(state["config"]["data_dir"], "val", context_length=1)
    model = load_model(state).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    enlarged = model_config(Config(**state["config"]), model.config.vocab_size)
    tokenizer = load_tokenizer(data.tokenizer)
    return Run(model, tokenizer, data.vocab_size, data.end_of_text, enlarged)
