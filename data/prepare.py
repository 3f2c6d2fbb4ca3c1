"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine

Inputs are .txt and .jsonl (one object a line, its text under the key `text`), plain or compressed
(.gz, .xz). The folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian
uint16 or uint32), a copy of the vocabulary (except gpt2, which tiktoken knows), and `meta.json`,
which says what the files hold. The folder appears as a whole or not at all. A process that is
killed leaves a hidden folder beside it, `.NAME.tmp-...`, which you may delete.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import math
import os
import secrets
import shutil
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data import DataError
from data.tokenizer import SHIPPED_RANKS, Encoding, encode_blocks, load_tokenizer, tokenizer_files

SHIPPED_CORPUS = SHIPPED_RANKS.with_name("sotu.jsonl.xz")
SHIPPED_FOLDER = "data/sotu"  # where train.py looks for its tokens
VAL_FRACTION = 0.05
SHARD_TOKENS = 2**28  # 512 MiB a file in uint16
PART_BYTES = 2**15  # each part of a .txt file, of about this size, goes to one of the splits
BATCH_BYTES = 2**20  # what a thread tokenizes at a time
MAX_LINE_BYTES = 2**28  # of .jsonl: a line is held in memory, and a compressed one may be endless
UNPACK = {".gz": gzip.open, ".xz": lzma.open}
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

    Each line of a .jsonl file is a document, and so is a .txt file; `<|endoftext|>` comes after it.
    A .jsonl document goes to one of the splits as a whole. A .txt file is cut at line ends into
    parts of about 32 KiB, and each part goes to one of the splits. Same inputs give same bytes.

    Raises DataError. Then `out` is as it was before.
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
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        meta = _write_tokens(inputs, encoding, val_fraction, temporary, shard_tokens)
        meta["tokenizer"] = tokenizer if tokenizer in ("shipped", "gpt2") else encoding.name
        for name, path in tokenizer_files(tokenizer).items():
            (temporary / name).write_bytes(path.read_bytes())
        (temporary / "meta.json").write_bytes(json.dumps(meta, indent=1).encode() + b"\n")
        _refuse_existing(out, overwrite)  # again: it may have come, or changed, since the start
        old = out.with_name(f"{temporary.name}-old")
        if overwrite and out.exists():
            os.rename(out, old)
        os.rename(temporary, out)  # fails if another process has made `out` by now
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:  # of writing: errors of reading are a DataError already
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def prepare_shipped(data_dir: str) -> None:
    """Makes the tokens of the shipped corpus if `data_dir` is their folder and it is not there yet.
    This takes a few seconds."""
    out = Path(data_dir)
    if data_dir == SHIPPED_FOLDER and not out.exists():
        try:
            prepare([SHIPPED_CORPUS], "shipped", out)
        except DataError:
            if not (out / "meta.json").exists():  # else another process was faster, which is fine
                raise


def _refuse_existing(out: Path, overwrite: bool) -> None:
    """--overwrite removes a folder. It must hold nothing but what data.prepare writes."""
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out}: exists; give another --out, or --overwrite to replace it")
    known = {path for pattern in WRITTEN_FILES for path in out.glob(pattern)}
    if not (out / "meta.json").is_file() or set(out.iterdir()) - known:
        raise DataError(f"{out}: is not (only) prepared data, so --overwrite leaves it alone")


# ---- reading ---------------------------------------------------------------------------------


def _text_format(path: Path) -> str:
    """`.txt` or `.jsonl`, by the name."""
    unpacked = path.stem if path.suffix.lower() in UNPACK else path.name
    suffix = Path(unpacked).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: should end in .txt or .jsonl, or one of these and .gz or .xz")
    return suffix


def _read_items(paths: list[Path], bar: tqdm) -> Iterator[tuple[bytes, bool]]:
    """Yields (text, whether a document ends here). Each item goes to one split; none is empty.

    The text is the very bytes of a .txt file, or UTF-8 from a .jsonl file.
    """
    before = 0
    for path in paths:
        try:
            with path.open("rb") as raw:
                unpack = UNPACK.get(path.suffix.lower())
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


# ---- tokenizing and writing ------------------------------------------------------------------


class _Split:
    """Writes the shards of one split. `meta` is what meta.json says about it."""

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.meta = {
            "tokens": 0,
            "bytes": 0,  # of text, without the tokens that end documents
            "documents": 0,  # that end in this split
            "shards": [],
        }

    def write(self, tokens: np.ndarray) -> None:
        shards = self.meta["shards"]
        self.meta["tokens"] += len(tokens)
        while len(tokens):
            if not shards or shards[-1]["tokens"] == self.shard_tokens:
                shards.append({"file": f"{self.name}_{len(shards):03d}.bin", "tokens": 0})
                self.sha256 = hashlib.sha256()
            shard = shards[-1]
            part = tokens[: self.shard_tokens - shard["tokens"]]
            with (self.folder / shard["file"]).open("ab") as file:
                file.write(part)
            self.sha256.update(part)
            shard["tokens"] += len(part)
            shard["sha256"] = self.sha256.hexdigest()
            tokens = tokens[len(part) :]


def _write_tokens(
    inputs: list[Path], encoding: Encoding, val_fraction: float, folder: Path, shard_tokens: int
) -> dict:
    """Reads, tokenizes on all cores and writes. Returns the meta without the tokenizer's name."""
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    splits = {name: _Split(folder, name, shard_tokens) for name in ("train", "val")}
    # Threads suffice, as tiktoken releases Python's lock. And no thread outlives a kill.
    workers = os.cpu_count() or 1
    running: deque[Future] = deque()  # in the order of the input
    batch: list[tuple[str, bytes, bool]] = []
    batch_bytes = items = 0

    def write_oldest() -> None:
        for name, tokens in running.popleft().result().items():
            splits[name].write(tokens)

    total = sum(path.stat().st_size for path in inputs)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        for items, (text, ends_document) in enumerate(_read_items(inputs, bar), 1):
            name = "val" if is_validation(items - 1, val_fraction) else "train"
            splits[name].meta["bytes"] += len(text)
            splits[name].meta["documents"] += ends_document
            batch.append((name, text, ends_document))
            batch_bytes += len(text)
            if batch_bytes >= BATCH_BYTES:
                running.append(pool.submit(_encode, encoding, dtype, batch))
                batch, batch_bytes = [], 0
                if len(running) > 2 * workers:  # reading may not run ahead: memory stays bounded
                    write_oldest()
        running.append(pool.submit(_encode, encoding, dtype, batch))
        while running:
            write_oldest()

    for name, split in splits.items():
        if not split.meta["tokens"]:
            raise DataError(
                f"the {name} split would be empty: the inputs have {items} documents or 32 KiB "
                f"parts, --val-fraction is {val_fraction}; give more text or another fraction"
            )
    return {
        "dtype": dtype.name,
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding.eot_token,
        **{name: split.meta for name, split in splits.items()},
    }


def _encode(
    encoding: Encoding, dtype: np.dtype, batch: list[tuple[str, bytes, bool]]
) -> dict[str, np.ndarray]:
    """The tokens of a batch's texts, in order, for each split."""
    tokens = {"train": array("I"), "val": array("I")}  # smaller than lists
    for name, text, ends_document in batch:
        for block in encode_blocks(encoding, text):
            tokens[name].extend(block)
        if ends_document:
            tokens[name].append(encoding.eot_token)
    return {name: np.asarray(ids).astype(dtype) for name, ids in tokens.items()}


# ---- command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    known = "gpt2, shipped, a tiktoken rank file, or a Hugging Face folder"
    parser.add_argument("--tokenizer", required=True, help=known)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--val-fraction", type=float, default=VAL_FRACTION)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --out")
    args = parser.parse_args(argv)
    try:
        meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction, args.overwrite)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split in ("train", "val"):
        counts = [f"{meta[split][key]:,} {key}" for key in ("tokens", "bytes", "documents")]
        print(f"{split}: {', '.join(counts)}")
    print(f"{args.out}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
