"""What you do with a run. Each module with a `main` is a command: python -m tools.NAME --help."""

import sys
from collections.abc import Callable
from functools import wraps

from data import DataError
from run import UserError
from run.files import drop_output


def command(main: Callable) -> Callable[..., int]:
    """A `main(argv)` whose errors for people become one line and exit code 2; Ctrl-C gives 130."""

    @wraps(main)
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


def positive(text: str) -> int:
    """An argument of a command that is 1 or more. argparse makes the ValueError one line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)
