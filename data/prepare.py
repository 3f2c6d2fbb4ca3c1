"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine

Inputs are .txt and .jsonl (an object a line, its text under the key `text`), plain or compressed
(.gz, .xz). The folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ... little-endian
uint16 or uint32), the vocabulary (`tokenizer.tiktoken`, or `tokenizer.json` with its config; not
for gpt2, which tiktoken knows), and `meta.json`, which says what the files hold. It appears as a
whole or not at all.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import secrets
import shutil
import sys
import time
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data import DataError
from data.tokenizer import (
    SHIPPED_RANKS,
    Encoding,
    encode_blocks,
    load_tokenizer,
    tokenizer_files,
)

SHIPPED_CORPUS = SHIPPED_RANKS.with_name("sotu.jsonl.xz")
VAL_FRACTION = 0.05
SHARD_TOKENS = 2**28  # 512 MiB a file in uint16
PART_BYTES = 2**15  # a .txt file is dealt out to the splits in parts of about this size
BATCH_BYTES = 2**20  # what a thread tokenizes at a time
MAX_LINE_BYTES = 2**28  # of .jsonl: a line is held in memory, and a compressed one may be endless
WRITTEN_FILES = ("*.bin", "meta.json", "tokenizer.tiktoken")
WRITTEN_FILES += ("tokenizer.json", "tokenizer_config.json")


def is_validation(item: int, fraction: float) -> bool:
    """Whether item 0, 1, 2, ... of a corpus is held out: `fraction` of them, evenly spread."""
    return math.floor((item + 1) * fraction + 0.5) > math.floor(item * fraction + 0.5)


def prepare(
    inputs: list[Path],
    tokenizer: str,
    out: Path,
    val_fraction: float = VAL_FRACTION,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Tokenizes `inputs` into the folder `out` and returns what its meta.json says.

    A .jsonl line is a document; so is a .txt file. `<|endoftext|>` stands after each document. The
    validation split is made of whole .jsonl documents, and of parts of about 32 KiB, cut at line
    ends, of .txt files, so that one long file serves too. Same inputs, same bytes.

    Raises DataError, with nothing left at `out` that was not there before.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    for path in inputs:
        _text_format(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    encoding = load_tokenizer(tokenizer)
    out = Path(os.path.realpath(out))  # a symbolic link to another disk is followed, not replaced
    _refuse_existing(out, overwrite)

    temporary = _temporary_beside(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        temporary.mkdir()
        meta = _write_tokens(inputs, encoding, val_fraction, temporary, shard_tokens)
        meta["tokenizer"] = tokenizer if tokenizer in ("shipped", "gpt2") else encoding.name
        for name, path in tokenizer_files(tokenizer).items():
            _write_file(temporary / name, path.read_bytes())
        _write_file(temporary / "meta.json", json.dumps(meta, indent=1).encode() + b"\n")
        _sync_folder(temporary)
        _publish(temporary, out, overwrite)
    except OSError as error:  # reading has its own messages, so this is about writing
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def prepare_shipped(out: Path) -> None:
    """Makes the token files of the corpus that ships with the project; a few seconds."""
    try:
        prepare([SHIPPED_CORPUS], "shipped", Path(out))
    except DataError:
        if not (Path(out) / "meta.json").exists():  # else another process was faster: fine
            raise


# ---- reading ---------------------------------------------------------------------------------


def _text_format(path: Path) -> str:
    """`.txt` or `.jsonl`, by the name; a bare .gz or .xz holds plain text."""
    name = path.name.lower()
    packed = name.endswith((".gz", ".xz"))
    suffix = Path(name[:-3] if packed else name).suffix
    if suffix in (".txt", ".jsonl"):
        return suffix
    if packed and not suffix:
        return ".txt"
    raise DataError(f"{path}: should end in .txt or .jsonl, or one of these and .gz or .xz")


def _read_items(paths: list[Path], bar: tqdm) -> Iterator[tuple[bytes, bool]]:
    """All (text, whether a document ends here): the units that the split deals out, never empty.

    Text is bytes exactly as they stand in a .txt file, and UTF-8 from a .jsonl file.
    """
    before = 0
    for path in paths:
        try:
            with path.open("rb") as raw:
                unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
                stream = unpack(raw) if unpack else raw
                read = _read_jsonl if _text_format(path) == ".jsonl" else _read_text
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
            part += stream.readline(PART_BYTES)  # bounded: there may be no line end at all
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
            # JSON can spell half a surrogate pair (\ud800). It is kept, as its three bytes.
            data = text.encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(
                f'{path}, line {number}: should be UTF-8 JSON like {{"text": "..."}}'
            ) from None
        if data:
            yield data, True


# ---- tokenizing and writing ------------------------------------------------------------------


class _Split:
    """The shards of one split while they are written, and the counts for meta.json."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.bytes = 0
        self.documents = 0
        self.shards: list[dict] = []
        self.file = None

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                shard = {"file": f"{self.name}_{len(self.shards):03d}.bin", "tokens": 0}
                self.shards.append(shard)
                self.file = (self.folder / shard["file"]).open("wb")
                self.sha256 = hashlib.sha256()
            shard = self.shards[-1]
            fits = tokens[: self.shard_tokens - shard["tokens"]]
            data = fits.astype(self.dtype).tobytes()
            self.file.write(data)
            self.sha256.update(data)
            shard["tokens"] += len(fits)
            tokens = tokens[len(fits) :]
            if shard["tokens"] == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            self.shards[-1]["sha256"] = self.sha256.hexdigest()

    def meta(self) -> dict:
        return {
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "bytes": self.bytes,  # of text: separators are none
            "documents": self.documents,  # that end in this split
            "shards": self.shards,
        }


def _write_tokens(
    inputs: list[Path],
    encoding: Encoding,
    val_fraction: float,
    folder: Path,
    shard_tokens: int,
) -> dict:
    """Reads, tokenizes on all cores and writes; returns the meta without the tokenizer's name."""
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    splits = {name: _Split(folder, name, dtype, shard_tokens) for name in ("train", "val")}
    # Threads, not processes: tiktoken lets go of Python's lock, and no worker outlives a kill.
    workers = os.cpu_count() or 1
    running: deque = deque()  # (future, bytes of its text), in the order of the input
    batch: list[tuple[str, bytes, bool]] = []
    batch_bytes = 0
    items = 0

    def write_oldest() -> None:
        for name, tokens in running.popleft()[0].result().items():
            splits[name].write(tokens)

    total = sum(path.stat().st_size for path in inputs)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        for items, (text, ends_document) in enumerate(_read_items(inputs, bar), 1):
            name = "val" if is_validation(items - 1, val_fraction) else "train"
            splits[name].bytes += len(text)
            splits[name].documents += ends_document
            batch.append((name, text, ends_document))
            batch_bytes += len(text)
            if batch_bytes >= BATCH_BYTES:
                running.append((pool.submit(_encode, encoding, batch), batch_bytes))
                batch, batch_bytes = [], 0
                # Reading may not run ahead of the tokenizers: memory stays bounded.
                while sum(size for _, size in running) > 2 * workers * BATCH_BYTES:
                    write_oldest()
        running.append((pool.submit(_encode, encoding, batch), batch_bytes))
        while running:
            write_oldest()

    for name, split in splits.items():
        split.close()
        if not split.shards:
            raise DataError(_too_little(name, items, val_fraction))
    return {
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding.eot_token,
        **{name: split.meta() for name, split in splits.items()},
    }


def _encode(encoding: Encoding, batch: list[tuple[str, bytes, bool]]) -> dict[str, np.ndarray]:
    """The tokens of a batch's texts, in order, for each split."""
    tokens = {"train": array("I"), "val": array("I")}  # compact, unlike lists of Python ints
    for name, text, ends_document in batch:
        for block in encode_blocks(encoding, text):
            tokens[name].extend(block)
        if ends_document:
            tokens[name].append(encoding.eot_token)
    return {name: np.asarray(ids) for name, ids in tokens.items()}


def _too_little(split: str, items: int, val_fraction: float) -> str:
    if items == 0:
        return "the inputs hold no text; nothing to do"
    if items == 1:
        return "one document or 32 KiB part cannot make two splits; give more text"
    # Rounding holds out at least one of n items from a fraction of 0.5 / n on.
    least = math.ceil(500 / items) / 1000
    advice = f"of at least {least}" if split == "val" else f"below {1 - least:.3f}"
    return (
        f"--val-fraction {val_fraction} of {items} documents or 32 KiB parts leaves the {split} "
        f"split empty; give more text or a fraction {advice}"
    )


# ---- the folder appears as a whole -----------------------------------------------------------


def _refuse_existing(out: Path, overwrite: bool) -> None:
    """--overwrite removes a folder, so it must be one that this program made."""
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out}: exists; give another --out, or --overwrite to replace it")
    known = {path for pattern in WRITTEN_FILES for path in out.glob(pattern)}
    if not (out / "meta.json").is_file() or set(out.iterdir()) - known:
        raise DataError(f"{out}: is not (only) prepared data, so --overwrite leaves it alone")


def _publish(temporary: Path, out: Path, overwrite: bool) -> None:
    """Renames the finished folder to its name, also when another process does so meanwhile."""
    while True:
        try:
            os.rename(temporary, out)  # fails where a folder with files in it exists
            _sync_folder(out.parent)
            return
        except OSError:
            if not out.exists():
                raise
        if overwrite:
            _refuse_existing(out, overwrite)
            old = _temporary_beside(out)
            try:
                os.rename(out, old)
            except FileNotFoundError:  # the other process is at this very point
                continue
            shutil.rmtree(old)
        elif _same_meta(temporary, out):
            return
        else:
            raise DataError(f"{out}: another process made it meanwhile, from other inputs")


def _same_meta(a: Path, b: Path) -> bool:
    try:
        return (a / "meta.json").read_bytes() == (b / "meta.json").read_bytes()
    except OSError:
        return False


def _temporary_beside(out: Path) -> Path:
    name = f".{out.name}.tmp-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    return out.with_name(name)


def _remove_stale(out: Path) -> None:
    """Removes what killed preparations of `out` on this machine have left."""
    if os.name != "posix":  # elsewhere, asking whether a process lives can end it
        return
    prefix = f".{out.name}.tmp-{platform.node()}-"
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                pass  # it lives and belongs to somebody else


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes names last over a power cut, not only contents."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage
        raise DataError(f"{message}; --help explains")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m data.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    known = "gpt2, shipped, a tiktoken rank file, or a Hugging Face folder"
    parser.add_argument("--tokenizer", required=True, help=known)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--val-fraction", type=float, default=VAL_FRACTION)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --out")
    started = time.perf_counter()
    try:
        args = parser.parse_args(argv)
        meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction, args.overwrite)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split in ("train", "val"):
        counts = meta[split]
        print(
            f"{split}: {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, "
            f"{counts['documents']:,} documents"
        )
    print(f"{args.out}: ready in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
