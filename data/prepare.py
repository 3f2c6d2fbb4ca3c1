"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine

Inputs are .txt and .jsonl (one object a line, its text under the key `text`), plain or compressed
(.gz, .xz). The folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian
uint16 or uint32), a copy of the vocabulary (except gpt2, which tiktoken knows), the number of bytes
of each token in it (`token_bytes.bin`, uint16), and `meta.json`, which says what the files hold.
The folder appears as a whole or not at all. A process that is killed leaves a hidden folder beside
it, `.NAME.tmp-...`, which you may delete.
"""

import argparse
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import DataError
from data.text import Items, read_items, reader
from data.tokenizer import Encoding, encode_bytes, load_tokenizer, token_bytes, tokenizer_files

SHIPPED_CORPUS = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
SHIPPED_FOLDER = "data/sotu"  # where train.py looks for its tokens
VAL_FRACTION = 0.05
SHARD_TOKENS = 2**28  # 512 MiB a file in uint16
BATCH_BYTES = 2**20  # what a thread tokenizes at a time


def is_validation(item: int, fraction: float) -> bool:
    """Whether item 0, 1, 2, ... of a corpus is held out: `fraction` of them, evenly spread."""
    return math.floor((item + 1) * fraction + 0.5) > math.floor(item * fraction + 0.5)


def prepare(
    inputs: list[Path],
    tokenizer: str,
    out: Path,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Tokenizes `inputs` into the folder `out` and returns what its meta.json says.

    Each line of a .jsonl file is a document, and so is a .txt file; `<|endoftext|>` comes after it.
    A .jsonl document goes to one of the splits as a whole. A .txt file is cut at line ends into
    parts of about 32 KiB, and each part goes to one of the splits. Same inputs give same bytes.

    Raises DataError, also where `out` exists.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    for path in inputs:
        reader(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    encoding = load_tokenizer(tokenizer)
    if out.exists():
        raise DataError(f"{out}: exists; remove it, or give another --out")
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        meta = _write_tokens(inputs, encoding, val_fraction, temporary, shard_tokens)
        meta["tokenizer"] = Path(tokenizer).name
        files = {name: path.read_bytes() for name, path in tokenizer_files(tokenizer).items()}
        files["token_bytes.bin"] = token_bytes(encoding).tobytes()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        meta["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in files}
        (temporary / "meta.json").write_bytes(json.dumps(meta, indent=1).encode() + b"\n")
        os.rename(temporary, out)  # fails if another process has made `out` by now
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
            if not out.exists():  # else another process was faster: fine
                raise


class Split:
    """Writes the shards of one split. `meta` is what meta.json says about it."""

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        # bytes: of text, without the tokens that end documents. documents: that end in this split
        self.meta = {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}

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


Batch = list[tuple[str, bytes, bool]]  # split, text, whether a document ends here


def _batches(items: Items, val_fraction: float) -> Iterator[Batch]:
    """The items, each with the name of its split, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for i, (text, ends_document) in enumerate(items):
        name = "val" if is_validation(i, val_fraction) else "train"
        batch.append((name, text, ends_document))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _encode(encoding: Encoding, dtype: np.dtype, batch: Batch) -> dict[str, np.ndarray]:
    """The tokens of a batch's texts, in order, for each split."""
    tokens: dict[str, list[int]] = {"train": [], "val": []}
    for name, text, ends_document in batch:
        tokens[name] += encode_bytes(encoding, text)
        if ends_document:
            tokens[name].append(encoding.eot_token)
    return {name: np.array(ids, dtype) for name, ids in tokens.items()}


def _write_tokens(
    inputs: list[Path], encoding: Encoding, val_fraction: float, folder: Path, shard_tokens: int
) -> dict:
    """Reads, tokenizes on all cores and writes. Returns the meta without the tokenizer."""
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    splits = {name: Split(folder, name, shard_tokens) for name in ("train", "val")}
    # Threads suffice, as both tokenizers release Python's lock. And no thread outlives a kill.
    workers = os.cpu_count() or 1
    running: deque[Future] = deque()  # in the order of the input

    def write_oldest() -> None:
        for name, tokens in running.popleft().result().items():
            splits[name].write(tokens)

    total = sum(path.stat().st_size for path in inputs)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        for batch in _batches(read_items(inputs, bar), val_fraction):
            for name, text, ends_document in batch:
                splits[name].meta["bytes"] += len(text)
                splits[name].meta["documents"] += ends_document
            running.append(pool.submit(_encode, encoding, dtype, batch))
            if len(running) > 2 * workers:  # reading may not run ahead: memory stays bounded
                write_oldest()
        while running:
            write_oldest()

    for name, split in splits.items():
        if not split.meta["tokens"]:
            what = f"the {name} split would be empty with --val-fraction {val_fraction}"
            raise DataError(f"{what}; give more documents, or another fraction")
    vocabulary = {"vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    return {"dtype": dtype.name} | vocabulary | {name: splits[name].meta for name in splits}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    known = "gpt2, shipped, a tiktoken rank file, or a Hugging Face folder"
    parser.add_argument("--tokenizer", required=True, help=known)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--val-fraction", type=float, default=VAL_FRACTION)
    args = parser.parse_args(argv)
    try:
        meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for split in ("train", "val"):
        counts = [f"{meta[split][key]:,} {key}" for key in ("tokens", "bytes", "documents")]
        print(f"{split}: {', '.join(counts)}")
    print(f"{args.out}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
