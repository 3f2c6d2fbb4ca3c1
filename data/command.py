"""How a command ends: an error for a person is one line."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress


class UserError(Exception):
    """One line for a person: what is wrong, where, what to do. `code` is the exit code: 2 for bad
    input, found before anything was written; 1 for what went wrong later."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def command(main: Callable) -> Callable[..., int]:
    """A `main(argv)` that returns its exit code. Its errors for people become one line, Ctrl-C is
    130. What standard output cannot encode (in a pipe on Windows) is printed as \\xe9."""

    def wrapped(argv: list[str] | None = None) -> int:
        with suppress(AttributeError):  # None where it was closed; a notebook's encodes all
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = main(sys.argv[1:] if argv is None else argv) or 0
            print(end="", flush=True)
            return code
        except BrokenPipeError:  # `| head`
            return 0
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return getattr(error, "code", 2)
        except ModuleNotFoundError as error:  # of an extra; or this Python was built without it
            own = str(error.name).partition(".")[0] in sys.stdlib_module_names
            way = "take another build of Python" if own else "pip install -r requirements-extra.txt"
            print(f"error: {error}; {way}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        finally:  # what waits in its buffer, such as --help, would show a traceback at Python's end
            try:
                print(end="", flush=True)
            except OSError:
                drop_output()
        if argv is None:  # a program does not wait for its threads, which may compile a model
            os._exit(130)
        return 130

    return wrapped


def drop_output() -> None:
    """Let standard output lead nowhere: what waits in its buffer would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
