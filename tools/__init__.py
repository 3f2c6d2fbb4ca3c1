"""What you do with a run. Each module with a `main` is a command: python -m tools.NAME --help."""

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data import DataError
from run import UserError
from run.files import drop_output


def command(main: Callable) -> Callable[..., int]:
    """A `main(argv)` whose errors for people become one line and exit code 2; Ctrl-C gives 130."""

    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except BrokenPipeError:  # `| head`
            drop_output()
            return 0
        except (UserError, DataError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130

    return wrapped


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


positive = number(int, 1)
