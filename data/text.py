"""The texts in .txt and .jsonl files, plain or compressed, in the pieces that a split deals out."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data import DataError

PART_BYTES = 2**15  # each part of a .txt file, of about this size, goes to one of the splits
MAX_LINE_BYTES = 2**28  # of .jsonl: a line is held in memory, and a compressed one may be endless
UNPACK = {".gz": gzip.open, ".xz": lzma.open}


def text_format(path: Path) -> str:
    """`.txt` or `.jsonl`, by the name."""
    unpacked = path.stem if path.suffix.lower() in UNPACK else path.name
    suffix = Path(unpacked).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: should end in .txt or .jsonl, or one of these and .gz or .xz")
    return suffix


def read_items(paths: list[Path], bar: tqdm) -> Iterator[tuple[bytes, bool]]:
    """Yields (text, whether a document ends here). Each item goes to one split; none is empty.

    The text is the very bytes of a .txt file, or UTF-8 from a .jsonl file.
    """
    before = 0
    for path in paths:
        try:
            with path.open("rb") as raw:
                unpack = UNPACK.get(path.suffix.lower())
                stream = unpack(raw) if unpack else raw
                read = _read_jsonl if text_format(path) == ".jsonl" else _read_text
                for item in read(path, stream):
                    yield item
                    bar.update(before + raw.tell() - bar.n)  # compressed bytes: their sum is known
                before += raw.tell()
        except (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError) as error:
            what = str(error) or type(error).__name__
            raise DataError(f"{path}: cannot be read to its end: {what}") from None


def _read_text(path: Path, stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    while part := stream.read(PART_BYTES):
        if not part.endswith(b"\n"):
            part += stream.readline(PART_BYTES)  # has a limit, as there may be no line end
        yield part, not stream.peek(1)


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; cut it")
        if line.isspace():
            continue
        try:
            text = json.loads(line)["text"]
            # JSON can spell half a surrogate pair (\ud800). Its three bytes are kept.
            data = text.encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            what = 'should be UTF-8 JSON like {"text": "..."}'
            raise DataError(f"{path}, line {number}: {what}") from None
        if data:
            yield data, True
