"""Continue a prompt with a trained model: python -m tools.sample OUT_DIR --prompt "My fellow"

OUT_DIR is a run's folder, or a Hugging Face one. A sample ends at <|endoftext|> or after --tokens.
The model sees the last context_length tokens; each new token is one forward pass over all of them.
"""

import argparse
import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import encode_bytes
from tools import command
from tools.load import Trained, load_trained


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token. logits: (vocab_size,). temperature 0 takes the likeliest; top_k 0 draws from
    all; top_p draws from the fewest tokens that have this probability together (1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    p, token = torch.softmax(logits.double() / temperature, dim=-1).sort(descending=True)
    p = p[: top_k or len(p)]
    p = p / p.sum()
    likelier = p.cumsum(0) - p  # what all tokens before this one have together
    p = p[likelier < top_p]
    return int(token[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(trained: Trained, tokens: list[int], n: int, *choice) -> Iterator[int]:
    """Up to n tokens after `tokens`, one at a time; ends before <|endoftext|>. choice: what
    `choose` takes after the logits."""
    device, T = trained.model.embed.weight.device, trained.model.config.context_length
    for _ in range(n):
        logits = trained.model(torch.tensor([tokens[-T:]], device=device))  # (1, T, vocab_size)
        token = choose(logits[0, -1, : trained.vocab_size].cpu(), *choice)
        if token == trained.end_of_text:
            return
        yield token
        tokens = [*tokens, token]


def as_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode as it comes. A token may end within a character, which then waits for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--prompt", default="Fellow citizens of the Senate")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many for each sample")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="1: all tokens")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if min(args.top_k, args.tokens) < 0 or not 0 < args.top_p <= 1 or not 0 <= args.seed < 2**63:
        parser.error("--top_k, --tokens and --seed must not be negative, 0 < --top_p <= 1")
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        parser.error("--temperature must be 0, or lie between 0.001 and 1000")
    trained = load_trained(args.out_dir)
    prompt = os.fsencode(args.prompt)
    tokens = encode_bytes(trained.tokenizer, prompt) or [trained.end_of_text]
    generator = torch.Generator().manual_seed(args.seed)
    for i in range(args.samples):
        choice = (args.temperature, args.top_k, args.top_p, generator)
        new = generate(trained, tokens, args.tokens, *choice)
        pieces = map(trained.tokenizer.decode_single_token_bytes, new)
        print("\n---\n" if i else "", end="")
        for text in as_text(chain([prompt], pieces)):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(main())
