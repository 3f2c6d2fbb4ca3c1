"""A trained model and the tokenizer that it was trained with, for the tools that use them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import TokenDataset
from data.tokenizer import Encoding, load_tokenizer
from model import GPT, GPTConfig
from run.checkpoint import check_finite, load_checkpoint, load_model
from run.config import Config, model_config
from run.llama import load_folder


@dataclass
class Run:
    """`vocab_size`: logits past it only pad. `end_of_text`: a token id. `enlarged`: the shape that
    the run started from.
    """

    model: GPT
    tokenizer: Encoding
    vocab_size: int
    end_of_text: int
    enlarged: GPTConfig


def load_run(path: Path) -> Run:
    """What a run left in its out_dir, or a Hugging Face folder (llama.py); the model on the GPU if
    there is one, and in eval mode.

    Raises CheckpointError, also for weights that are not finite; DataError, where the folder that
    it was trained on is gone or damaged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from_elsewhere = (path / "config.json").exists() and not (path / "log.jsonl").exists()
    state = load_folder(path) if from_elsewhere else load_checkpoint(path / "checkpoint.pt")
    check_finite(state, path)
    if from_elsewhere:
        model, tokenizer = load_model(state).to(device).eval(), load_tokenizer(str(path))
        return Run(model, tokenizer, tokenizer.n_vocab, tokenizer.eot_token, model.config)
    data = TokenDataset(state["config"]["data_dir"], "val", context_length=1)
    model = load_model(state).to(device).eval()
    enlarged = model_config(Config(**state["config"]), model.config.vocab_size)
    tokenizer = load_tokenizer(data.tokenizer)
    return Run(model, tokenizer, data.vocab_size, data.end_of_text, enlarged)
