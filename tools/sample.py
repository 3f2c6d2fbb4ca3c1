"""Continue a prompt with a trained model: python -m tools.sample OUT_DIR --prompt "My fellow"

OUT_DIR is a run's folder, or a Hugging Face one. A sample ends at <|endoftext|>, where the context
is full, or after --tokens. --bench measures instead, side by side: the run's model and the enlarged
one it came from, or the models of other folders.
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

from data import DataError
from data.tokenizer import encode_bytes
from model import GPT
from run.checkpoint import CheckpointError
from run.report import one_or_all
from tools.bench import race
from tools.load import Run, load_run


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
def generate(
    run: Run,
    tokens: list[int],
    n: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Up to n tokens after `tokens`, one at a time. Ends before <|endoftext|>, and where prompt and
    sample together fill the context.
    """
    cache: dict = {}
    for _ in range(min(n, run.model.config.context_length - len(tokens))):
        new = torch.tensor([tokens], device=run.model.embed.weight.device)  # (1, T)
        logits = run.model(new, cache=cache)[0, -1, : run.vocab_size].cpu()
        tokens = [choose(logits, temperature, top_k, top_p, generator)]
        if tokens[0] == run.end_of_text:
            return
        yield tokens[0]


def as_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode as it comes. A token may end within a character, which then waits for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


@torch.no_grad()
def bench(models: dict[str, GPT], repeats: int = 5, least: float = 0.5) -> str:
    """A table of tokens per second, with ratios to the last model: reading 8 prompts of half a
    context (256 tokens at most) at once, and writing as many tokens after one, with the cache.
    """

    def half_of(model: GPT) -> int:
        return min(256, model.config.context_length // 2)

    def prompts(model: GPT, rows: int) -> Tensor:
        device = model.embed.weight.device
        return torch.zeros(rows, half_of(model), dtype=torch.long, device=device)

    def write(model: GPT) -> None:
        cache: dict = {}
        token = model(prompts(model, 1), cache=cache)[:, -1:].argmax(-1)  # (1, 1)
        for _ in range(half_of(model)):
            token = model(token, cache=cache).argmax(-1)
            token.item()  # as in `generate`, the next token waits for this one

    reading = [lambda model=model: model(prompts(model, 8)) for model in models.values()]
    writing = [lambda model=model: write(model) for model in models.values()]
    seconds = [race(calls, repeats, least) for calls in (reading, writing)]
    lines = ["| model | parameters | d_ff | KV groups | read, tokens/s | write, tokens/s |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for i, (name, model) in enumerate(models.items()):
        shape, half = model.shape(), half_of(model)
        cells = [name, f"{shape.n_parameters():,}"]
        cells += [str(one_or_all(widths)) for widths in (shape.d_ff, shape.n_kv_head)]
        for rows, times in zip((8, 1), seconds):
            cells.append(f"{rows * half / times[i]:,.0f} ({times[-1] / times[i]:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--prompt", default="Fellow citizens of the Senate")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many for each sample")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="1: all tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bench", type=Path, nargs="*", metavar="OUT_DIR", help="measure speed")
    args = parser.parse_args(argv)
    if min(args.top_k, args.tokens) < 0 or not 0 < args.top_p <= 1 or not 0 <= args.seed < 2**63:
        parser.error("--top_k, --tokens and --seed must not be negative, 0 < --top_p <= 1")
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        parser.error("--temperature must be 0, or lie between 0.001 and 1000")
    try:
        run = load_run(args.out_dir)
        if args.bench is not None:
            models = {str(args.out_dir): run.model}
            models |= {str(other): load_run(other).model for other in args.bench}
            if not args.bench:  # the speed of a shape does not depend on its weights
                models["enlarged"] = GPT(run.enlarged).to(run.model.embed.weight.device).eval()
            print(bench(models))
            return 0
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prompt = os.fsencode(args.prompt)
    tokens = encode_bytes(run.tokenizer, prompt) or [run.end_of_text]
    room = run.model.config.context_length
    if len(tokens) >= room:
        print(f"error: --prompt has {len(tokens)} tokens, the context {room}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(args.seed)
    for i in range(args.samples):
        choice = (args.temperature, args.top_k, args.top_p, generator)
        new = generate(run, tokens, args.tokens, *choice)
        print("\n---\n" if i else "", end="")
        pieces = map(run.tokenizer.decode_single_token_bytes, new)
        for text in as_text(chain([prompt], pieces)):
            print(text, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
