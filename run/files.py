"""Writing that may fail: a file has the old content or the new, never a part."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Fill a file by `write(file)`. keep: a second name for the old content. Raises OSError."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            keep.unlink(missing_ok=True)
            with suppress(OSError):  # a disk without hard links keeps no second file
                os.link(path, keep)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError, in an OSError
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error
    if os.name == "posix":  # elsewhere, a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # now the rename is durable
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
