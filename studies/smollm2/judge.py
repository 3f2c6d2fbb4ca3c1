"""Perplexity of a held-out speech: python -m studies.smollm2.judge MODEL ...

MODEL is a run's folder, or a Hugging Face one. The speech is the latest that no run on the shipped
corpus trains on.
"""

import json
import lzma
import sys
from argparse import ArgumentParser

from data.command import command
from data.prepare import SHIPPED_CORPUS, VAL_FRACTION, is_validation
from tools import expanded, load_trained
from tools.evaluate import judge_text

N_BYTES = 16_384  # of the speech
CONTEXT_LENGTH = 256  # tokens, as in the runs


def read_speech() -> bytes:
    with lzma.open(SHIPPED_CORPUS, "rt", encoding="utf-8") as lines:
        held_out = [s for i, s in enumerate(lines) if is_validation(i, VAL_FRACTION)]
    return json.loads(held_out[-1])["text"].encode()[:N_BYTES]


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=expanded, nargs="+", metavar="MODEL")
    speech = read_speech()
    print("| model | perplexity |\n| --- | --- |")
    for path in parser.parse_args(argv).models:
        perplexity = judge_text(load_trained(path), speech, CONTEXT_LENGTH)["perplexity per token"]
        print(f"| {path} | {perplexity:.1f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
