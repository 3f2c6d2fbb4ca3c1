"""Continue a prompt with a trained model: python -m tools.sample OUT_DIR --prompt "My fellow"

OUT_DIR is a run's folder. The tokenizer is the one its data was made with.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import CheckpointError, load_checkpoint, load_model
from data import DataError
from data.loader import TokenDataset
from data.tokenizer import load_tokenizer
from model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[int],
    n: int,
    vocab_size: int,
    stop: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """Up to n tokens after `tokens`, at most until `stop`. temperature 0 takes the likeliest;
    top_k 0 samples from all. The model sees the last context_length tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(n):
        window = torch.tensor([tokens[-model.config.context_length :]])  # (1, T)
        logits: Tensor = model(window)[0, -1, :vocab_size]  # what is past it only pads
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            if top_k:
                weakest = logits.topk(min(top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < weakest, -torch.inf)
            p = torch.softmax(logits / temperature, dim=-1)
            chosen = int(torch.multinomial(p, 1, generator=generator))
        tokens.append(chosen)
        if chosen == stop:
            break
    return tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--prompt", default="Fellow citizens of the Senate")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        state = load_checkpoint(args.out_dir / "checkpoint.pt")
        data = TokenDataset(state["config"]["data_dir"], "val", context_length=1)
        tokenizer = load_tokenizer(data.tokenizer)
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if min(args.temperature, args.top_k, args.tokens) < 0:
        parser.error("--temperature, --top_k and --tokens must not be negative")
    stop = data.end_of_text
    start = tokenizer.encode_ordinary(args.prompt) or [stop]
    model = load_model(state).eval()
    choice = (args.temperature, args.top_k, args.seed)
    tokens = generate(model, start, args.tokens, data.vocab_size, stop, *choice)
    print(tokenizer.decode(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
