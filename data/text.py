"""The texts in .txt, .jsonl and .parquet files.

A reader function for each format takes a path, the unpacked stream of that file, and
the key of the text. It yields items: the bytes of a text or of a part of it, and
whether a document ends there. The item of a document without text has b"".
"""

import glob
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data.command import UserError

# A .txt file is divided into parts of about this size. Each part goes to one split.
PART_BYTES = 2**15

Items = Iterator[tuple[bytes, bool]]
Reader = Callable[[Path, io.BufferedReader, str], Items]


def read_txt(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """Yields the parts of a file, which is one document and need not be UTF-8.

    A part ends at a line end. If a line is too long for that, the part does not end
    inside a UTF-8 character.
    """
    while part := stream.read(PART_BYTES):
        if not part.endswith(b"\n"):
            part += stream.readline(PART_BYTES)
        for _ in range(3):  # a UTF-8 character has at most three more bytes
            next_byte = stream.peek(1)[:1]
            if b"\x80" <= next_byte < b"\xc0":
                part += stream.read(1)
        ends_document = not stream.peek(1)
        yield part, ends_document


def read_jsonl(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """Yields the documents of a file: each line is an object with its text under `key`.

    The text may be null.
    """
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            text = json.loads(line)[key]
            content = b""
            if text is not None:
                # JSON can spell half a surrogate pair (\ud800), which is no UTF-8.
                content = text.encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError):
            problem = f'should be UTF-8 JSON like {{"{key}": "..."}}'
            advice = "--key names another key"
            place = f"{path}, line {number}"
            raise UserError(f"{place}: {problem}; {advice}") from None
        yield content, True


def read_parquet(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """Yields the documents of a file: each row has its text in the column `key`.

    The text may be null.
    """
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    columns = file.schema_arrow.names
    if key not in columns:
        problem = f"has no column {key}; --key can be: {', '.join(columns)}"
        raise UserError(f"{path}: {problem}")
    for rows in file.iter_batches(1024, columns=[key]):
        texts = rows.column(0).cast(pyarrow.large_binary())
        for text in texts.to_pylist():
            yield text or b"", True


def open_xz(file: io.RawIOBase) -> io.BufferedIOBase:
    """Returns the unpacked stream of an .xz file."""
    import lzma  # here, because a Python that was built without it can read the rest

    return lzma.open(file)


READ = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
UNPACK = {".gz": gzip.open, ".xz": open_xz}


def reader(path: Path) -> Reader | None:
    """Returns the reader function for the name of a file, or None."""
    if path.suffix.lower() in UNPACK:
        path = path.with_suffix("")
    return READ.get(path.suffix.lower())


def find_inputs(names: list[str | Path]) -> list[Path]:
    """Returns the files to read, in order, each one once.

    A name is a file, a folder or a glob. Warns about what it skips in a folder or glob,
    because that text might be missed: other formats, links to folders, and locked
    folders. Hidden files are skipped without a warning, because macOS and Jupyter leave
    many.

    Raises UserError if a name leads to no file to read.
    """
    inputs = {}  # resolved path -> path, because several names can lead to one file
    for name in map(str, names):
        found = []
        skipped = []
        for path in visible_paths(name):
            if reader(path) and path.is_file():
                found.append(path)
            else:
                skipped.append(path)
        if not found:
            ends = ", ".join([*READ, *UNPACK])
            problem = f"no such file, or none that ends in one of {ends}"
            raise UserError(f"{name!r}: {problem}")
        if skipped:
            examples = ", ".join(str(path) for path in skipped[:5])
            message = f"left out: {len(skipped)} in {name}, such as {examples}"
            print(message, file=sys.stderr)
        for path in found:
            inputs.setdefault(path.resolve(), path)
    return list(inputs.values())


def visible_paths(name: str) -> list[Path]:
    """Returns what a file, a folder or a glob stands for, in order.

    A folder stands for what is in it and in its folders, except for hidden files.
    Folders are returned only if they cannot be entered.
    """
    tops = [name] if os.path.exists(name) else glob.glob(name)
    paths = []
    for top in map(Path, tops):
        for path in (top, *top.rglob("*")):
            if not is_hidden(path, top) and not is_entered(path, top):
                paths.append(path)
    return sorted(paths)


def is_hidden(path: Path, top: Path) -> bool:
    """Returns whether a file or folder on the path below `top` is hidden."""
    return any(part.startswith(".") for part in path.relative_to(top).parts)


def is_entered(path: Path, top: Path) -> bool:
    """Returns whether top.rglob lists what is in this folder."""
    if not path.is_dir():
        return False
    is_link = path.is_symlink() and path != top
    return not is_link and os.access(path, os.R_OK)


class WatchedFile(io.FileIO):
    """A file that knows whether it was read to its end.

    lzma.open takes a damaged stream behind another one for the end of the file.
    """

    ended = False

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        if not content:
            self.ended = True
        return content


def read_items(path: Path, key: str) -> Items:
    """Yields the items of a file.

    Raises UserError if the file is damaged, or is not what its name says.
    """
    packing = path.suffix.lower()
    unpack = UNPACK.get(packing, io.BufferedReader)
    read = reader(path)
    try:
        with WatchedFile(path) as file:
            if packing in UNPACK and path.stat().st_size == 0:
                raise EOFError("it is empty")
            with unpack(file) as stream:
                yield from read(path, stream, key)
            if packing == ".xz" and not file.ended:
                raise EOFError("a part of the file is not .xz data")
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # each format has exceptions of its own
        problem = f"cannot be read to its end: {error!r}"
        raise UserError(f"{path}: {problem}") from None
