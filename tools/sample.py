"""Continue a text: python -m tools.sample OUT_DIR --prompt "My fellow citizens"

The continuation ends at <|endoftext|> or after --tokens. Each token takes one forward
pass over the last context_length tokens.
"""

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


def draw_token(
    logits: Tensor, temperature: float, top_k: int, generator: torch.Generator
) -> int:
    """The id of a token, drawn from softmax(logits / temperature).

    logits: (vocab_size,). temperature 0 takes the likeliest token. top_k: draw from so
    many of the likeliest tokens; 0: from all.
    """
    if temperature == 0:
        return int(logits.argmax())
    candidates = min(top_k or len(logits), len(logits))
    values, tokens = logits.topk(candidates)
    scaled = (values.double() - values[0]) / temperature
    probabilities = torch.softmax(scaled, dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(tokens[drawn])


@torch.no_grad()
def generate(
    trained: Trained,
    tokens: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Up to max_tokens tokens that continue `tokens`. Ends before <|endoftext|>.

    For temperature, top_k and generator, see draw_token. Raises UserError if the logits
    are not finite.
    """
    device = trained.model.embed.weight.device
    context_length = trained.model.config.context_length
    tokens = list(tokens)
    for _ in range(max_tokens):
        context = torch.tensor([tokens[-context_length:]], device=device)
        logits = trained.model(context)  # (1, T, vocab_size)
        # The model may have padding after the tokens of its tokenizer.
        logits = logits[0, -1, : trained.tokenizer.n_vocab].cpu()
        if not logits.isfinite().all():
            question = "has its training diverged?"
            raise UserError(f"the logits of the model are not finite: {question}")
        token = draw_token(logits, temperature, top_k, generator)
        if token == trained.tokenizer.eot_token:
            return
        yield token
        tokens.append(token)


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out_dir", type=expanded)
    add("--prompt", default="Fellow citizens of the Senate")
    add("--tokens", type=number(int, 0), default=200, help="at most")
    add("--temperature", type=number(float, 0), default=0.8, help="0: likeliest")
    add("--top_k", type=number(int, 0), default=50, help="0: all tokens")
    add("--seed", type=number(int, 0), default=1)
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    tokenizer = trained.tokenizer
    prompt = os.fsencode(args.prompt)  # the bytes of the command line, in any locale
    tokens = encode_to_numpy(tokenizer, prompt).tolist() or [tokenizer.eot_token]
    generator = torch.Generator().manual_seed(args.seed)
    new_tokens = generate(
        trained, tokens, args.tokens, args.temperature, args.top_k, generator
    )
    pieces = map(tokenizer.decode_single_token_bytes, new_tokens)
    # A token may end inside a character. The decoder keeps that part for the next one.
    for text in codecs.iterdecode(chain([prompt], pieces), "utf-8", errors="replace"):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    raise SystemExit(main())
