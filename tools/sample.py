"""Continue a prompt with a trained model: python -m tools.sample OUT_DIR --prompt "My fellow"

OUT_DIR: of a run, or a Hugging Face one. A sample ends at <|endoftext|> or after --tokens. Each
token is one forward pass over the last context_length tokens."""

import codecs
import os
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from data.command import UserError, command
from data.tokenizer import encode_to_numpy
from tools import Trained, expanded, load_trained, number


def draw_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """logits: (vocab_size,). temperature 0 takes the likeliest; top_k 0 draws from all."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    p = torch.softmax((values.double() - values[0]) / temperature, dim=-1)
    return int(tokens[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(trained: Trained, tokens: list[int], n: int, *choice) -> Iterator[int]:
    """Up to n tokens after `tokens`; ends before <|endoftext|>. choice: for `draw_token`. Raises
    UserError where the logits are not finite."""
    device, T = trained.model.embed.weight.device, trained.model.config.context_length
    for _ in range(n):
        logits = trained.model(torch.tensor([tokens[-T:]], device=device))  # (1, T, vocab_size)
        logits = logits[0, -1, : trained.tokenizer.n_vocab].cpu()
        if not logits.isfinite().all():
            raise UserError("the logits of the model are not finite: has its training diverged?")
        token = draw_token(logits, *choice)
        if token == trained.tokenizer.eot_token:
            return
        yield token
        tokens = [*tokens, token]


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded)
    parser.add_argument("--prompt", default="Fellow citizens of the Senate")
    parser.add_argument("--tokens", type=number(int, 0), default=200, help="at most")
    parser.add_argument("--temperature", type=number(float, 0), default=0.8, help="0: likeliest")
    parser.add_argument("--top_k", type=number(int, 0), default=50, help="0: all tokens")
    parser.add_argument("--seed", type=number(int, 0), default=1)
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    prompt = os.fsencode(args.prompt)
    tokens = encode_to_numpy(trained.tokenizer, prompt).tolist() or [trained.tokenizer.eot_token]
    generator = torch.Generator().manual_seed(args.seed)
    new = generate(trained, tokens, args.tokens, args.temperature, args.top_k, generator)
    pieces = map(trained.tokenizer.decode_single_token_bytes, new)
    # A token may end within a character, which then waits for its rest
    for text in codecs.iterdecode(chain([prompt], pieces), "utf-8", errors="replace"):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    raise SystemExit(main())
