"""The texts in .txt and .jsonl files, plain or compressed, in the pieces that a split deals out.

A format is one function: it takes a path and its unpacked stream, and yields items, which are
pairs (text, whether a document ends here). The text is bytes, and not empty.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data import DataError

PART_BYTES = 2**15  # each part of a .txt file, of about this size, goes to one of the splits
Items = Iterator[tuple[bytes, bool]]


def read_txt(path: Path, stream: BinaryIO) -> Items:
    """The very bytes of the file, which need not be UTF-8. It is one document."""
    while part := stream.read(PART_BYTES):
        if not part.endswith(b"\n"):
            part += stream.readline(PART_BYTES)  # has a limit, as there may be no line end
        for _ in range(3):  # the rest of a UTF-8 character, if the limit has cut one
            if b"\x80" <= stream.peek(1)[:1] < b"\xc0":
                part += stream.read(1)
        yield part, not stream.peek(1)


def read_jsonl(path: Path, stream: BinaryIO) -> Items:
    """Each line is an object, and a document: its text under the key `text`, as UTF-8."""
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            # JSON can spell half a surrogate pair (\ud800). Its three bytes are kept.
            text = json.loads(line)["text"].encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError):
            what = 'should be UTF-8 JSON like {"text": "..."}'
            raise DataError(f"{path}, line {number}: {what}") from None
        if text:
            yield text, True


READ = {".txt": read_txt, ".jsonl": read_jsonl}
UNPACK = {".gz": gzip.open, ".xz": lzma.open}


def reader(path: Path) -> Callable[[Path, BinaryIO], Items]:
    """The function that reads this file, by its name. Raises DataError."""
    unpacked = path.with_suffix("") if path.suffix.lower() in UNPACK else path
    if unpacked.suffix.lower() not in READ:
        kinds, packed = " or ".join(READ), " or ".join(UNPACK)
        raise DataError(f"{path}: should end in {kinds}, or one of these and {packed}")
    return READ[unpacked.suffix.lower()]


def read_items(paths: list[Path], bar: tqdm) -> Items:
    """The items of all files, in order. Raises DataError: damaged, or not what its name says."""
    before = 0
    for path in paths:
        try:
            with path.open("rb") as raw:
                unpack = UNPACK.get(path.suffix.lower())
                for item in reader(path)(path, unpack(raw) if unpack else raw):
                    yield item
                    bar.update(before + raw.tell() - bar.n)  # compressed bytes: their sum is known
                before += raw.tell()
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            what = str(error) or type(error).__name__
            raise DataError(f"{path}: cannot be read to its end: {what}") from None
