"""What you do with a run. Each module with a `main` is a command: python -m tools.NAME --help."""

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data import command


def program(main: Callable) -> Callable[..., int]:
    """The command of a module, from its `main(parser, argv)`. The parser says the first line of the
    module's docstring."""
    description = main.__globals__["__doc__"].split("\n")[0]
    return command(lambda argv: main(ArgumentParser(description=description), argv))


def expanded(text: str) -> Path:
    """The type of an argument that is a path. No shell expands the ~ of --out=~/x."""
    if not text:
        raise ArgumentTypeError("is empty")
    return Path(os.path.expanduser(text))


def number(kind: type, least: float, most: float = 2**63 - 1) -> Callable[[str], float]:
    """The type of an argument that is an int or a float from `least` to `most`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ArgumentTypeError(f"{text!r} is not from {least} to {most}")

    return read


def seed_range(text: str) -> range:
    """5 stands for the seeds 1 to 5, 21-30 for 21 to 30."""
    first, dash, last = text.rpartition("-")
    seeds = range(int(first) if dash else 1, int(last) + 1)
    if not 0 <= seeds.start < seeds.stop <= 10**6:
        raise ValueError(text)
    return seeds


positive = number(int, 1)
