"""The texts in .txt, .jsonl and .parquet files. A function for each format, of a path, its unpacked
stream and the key of the text, yields items: (text as bytes, or b"", does a document end here)."""

import glob
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from data.command import UserError

PART_BYTES = 2**15  # each part of a .txt file, of about this size, goes to one of the splits
Items = Iterator[tuple[bytes, bool]]


def read_txt(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """The very bytes of the file, which need not be UTF-8. It is one document."""
    while part := stream.read(PART_BYTES):
        if not part.endswith(b"\n"):
            part += stream.readline(PART_BYTES)  # has a limit, as there may be no line end
        for _ in range(3):  # the rest of a UTF-8 character, if the limit has cut one
            if b"\x80" <= stream.peek(1)[:1] < b"\xc0":
                part += stream.read(1)
        yield part, not stream.peek(1)


def read_jsonl(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """Each line is an object, and a document: its text under `key`, as UTF-8, or null."""
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            text = json.loads(line)[key]
            # JSON can spell half a surrogate pair (\ud800). Its three bytes are kept.
            text = b"" if text is None else text.encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError):
            what = f'should be UTF-8 JSON like {{"{key}": "..."}}; --key names another key'
            raise UserError(f"{path}, line {number}: {what}") from None
        yield text, True


def read_parquet(path: Path, stream: io.BufferedReader, key: str) -> Items:
    """Each row is a document: its text in the column `key`, or null."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    if key not in (names := file.schema_arrow.names):
        raise UserError(f"{path}: has no column {key}; --key can be: {', '.join(names)}")
    for rows in file.iter_batches(1024, columns=[key]):
        for text in rows.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield text or b"", True


class WatchedFile(io.FileIO):
    """Knows if it was read to its end: lzma.open takes a damaged stream behind others for that."""

    ended = False

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        self.ended |= not content
        return content


READ = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
# lzma is imported where it is used: where Python was built without it, all else works
UNPACK = {".gz": gzip.open, ".xz": lambda raw: import_module("lzma").open(raw)}


def reader(path: Path) -> Callable[[Path, io.BufferedReader, str], Items] | None:
    """The function that reads this file, by its name."""
    unpacked = path.with_suffix("") if path.suffix.lower() in UNPACK else path
    return READ.get(unpacked.suffix.lower())


def find_inputs(names: list[str | Path]) -> list[Path]:
    """The files to read, in order, each once. A name is a file, a folder or a glob. What a folder
    or glob has beside them is named, as its text may be missed: files that end otherwise, links to
    folders, locked folders. But hidden files are not, as macOS and Jupyter leave. Or UserError."""
    inputs: dict[Path, Path] = {}  # by the place of a file, whatever names and links lead there
    for name in map(str, names):
        tops = [name] if os.path.exists(name) else glob.glob(name)
        found, left_out = [], []
        for path in sorted(path for top in tops for path in _inside(Path(top))):
            (found if reader(path) and path.is_file() else left_out).append(path)
        if not found:
            ends = ", ".join([*READ, *UNPACK])
            raise UserError(f"{name!r}: no such file, or none that ends in one of {ends}")
        if left_out:
            some = ", ".join(map(str, left_out[:5]))
            print(f"left out: {len(left_out)} in {name}, such as {some}", file=sys.stderr)
        for path in found:
            inputs.setdefault(path.resolve(), path)
    return list(inputs.values())


def _inside(top: Path) -> Iterator[Path]:
    """The file itself; or what is in the folder, but what is hidden, and folders that rglob enters,
    which are neither links nor locked."""
    for path in (top, *top.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
        link = path.is_symlink() and path != top
        entered = path.is_dir() and not link and os.access(path, os.R_OK)
        if not hidden and not entered:
            yield path


def read_items(path: Path, key: str) -> Items:
    """The items of a file. Raises UserError where it is damaged, or not what its name says."""
    try:
        with WatchedFile(path) as raw:
            packing = path.suffix.lower()
            if packing in UNPACK and not path.stat().st_size:
                raise EOFError("it is empty")
            with UNPACK.get(packing, io.BufferedReader)(raw) as stream:
                yield from reader(path)(path, stream, key)
            if packing == ".xz" and not raw.ended:
                raise EOFError("a part of it is no .xz")
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # each format has classes of its own
        raise UserError(f"{path}: cannot be read to its end: {error!r}") from None
