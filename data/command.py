"""What a command prints and writes. An error for a person is one line."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from tqdm import tqdm

NO_ADVICE = MappingProxyType({})


class UserError(Exception):
    """One line for a person: what is wrong, where, and what to do.

    `code` is the exit code: 2 for bad input, found before anything was written; 1 for
    what went wrong later.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def describe_error(error: BaseException, advice=NO_ADVICE) -> tuple[str, int] | None:
    """One line for a person and an exit code, or None if the error is a bug.

    advice: type of exception -> a line to show instead of the error's own text.
    """
    for kind, line in advice.items():
        if isinstance(error, kind):
            return f"error: {line}", 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    if not isinstance(error, (UserError, OSError, ModuleNotFoundError)):
        return None
    line = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        if package in sys.stdlib_module_names:
            line += "; take another build of Python"
        else:
            line += "; pip install -r requirements-extra.txt"
    return f"error: {line}", getattr(error, "code", 2)


def command(main: Callable) -> Callable[..., int]:
    """A `main(argv)` that returns its exit code and shows errors in one line."""

    def wrapped(argv: list[str] | None = None) -> int:
        escape_characters()
        try:
            code = main(sys.argv[1:] if argv is None else argv) or 0
            print(end="", flush=True)
            return code
        except BrokenPipeError:  # `| head`
            return 0
        except (Exception, KeyboardInterrupt) as error:
            described = describe_error(error)
            if described is None:
                raise
            line, code = described
            print(line, file=sys.stderr)
        finally:
            flush_output()
        if code == 130 and argv is None:
            os._exit(code)  # a program does not wait for threads that compile a model
        return code

    return wrapped


def one_line_errors(advice=NO_ADVICE) -> None:
    """For a script without a main function: show its errors as describe_error does.

    All ranks of a machine make the same mistake with bad input, and one of them tells.
    """

    def show(kind, error, traceback):
        described = describe_error(error, advice)
        if described is None:
            sys.__excepthook__(kind, error, traceback)
            return
        line, code = described
        rank = os.environ.get("RANK", "0")
        if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
            prefix = f"rank {rank}: " if rank != "0" else ""
            # torch.distributed replaces sys.stderr, and os._exit would lose its text
            print(prefix + line, file=sys.__stderr__, flush=True)
        flush_output()
        if not sys.flags.interactive:
            os._exit(code)  # Python itself would end with code 1

    escape_characters()
    sys.excepthook = show


def escape_characters() -> None:
    """Print what standard output cannot encode (a pipe on Windows) as \\xe9."""
    with suppress(AttributeError):  # standard output is closed, or a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Print what waits in the buffer, or drop it if standard output leads nowhere."""
    try:
        print(end="", flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Let standard output lead nowhere, because its buffer would fail again at the
    end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print a line on rank 0, above its progress bar.

    If nobody reads standard output any more, the run goes on in silence.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"
    if is_first_rank and sys.stdout:  # None, if it is closed
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:
            drop_output()


def append_line(path: Path, line: str) -> None:
    """Add a line to a file at once. Raises UserError."""
    try:
        with open(path, "ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}", code=1) from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a file by write(file). Raises UserError.

    Atomic: after a crash you have either the old file or the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed, or a link
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError
        temporary.unlink(missing_ok=True)
        message = f"cannot write {path}: {error}; what was there before is whole"
        raise UserError(message, code=1) from error
