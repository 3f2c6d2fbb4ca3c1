"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine
    python -m data.prepare --input fineweb/ 'more/*.jsonl.zst' --tokenizer gpt2 --out data/fineweb

Inputs are .txt, .jsonl (one object a line) and .parquet, also compressed (.gz, .xz, .zst). The
folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian uint16 or
uint32), a copy of the vocabulary (except gpt2, which tiktoken knows), the number of bytes of each
token in it (`token_bytes.bin`, uint16), and `meta.json`, which says what the files hold.

The folder appears as a whole or not at all. Until then all is in a hidden folder beside it,
`.NAME.part`. After a kill or an error, the same command goes on with the first input file that was
not finished, and ends in the same bytes. To give up, remove that folder.
"""

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import DataError
from data.shards import Split, fingerprints, read_state, write_state
from data.text import find_inputs, read_items
from data.tokenizer import Encoding, encode_to_numpy, load_tokenizer, token_bytes, tokenizer_files

SHIPPED_CORPUS = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
SHIPPED_FOLDER = "data/sotu"  # where train.py looks for its tokens
VAL_FRACTION = 0.05
SHARD_TOKENS = 2**28  # 512 MiB a file in uint16
BATCH_BYTES = 2**20  # what a worker tokenizes at a time
WORKER_BYTES = 2**26  # of input for each worker: less is done before another one has started


def is_validation(item: int, fraction: float) -> bool:
    """Whether item 0, 1, 2, ... of a corpus is held out: `fraction` of them, evenly spread."""
    return math.floor((item + 1) * fraction + 0.5) > math.floor(item * fraction + 0.5)


def prepare(
    inputs: list[Path],
    tokenizer: str,
    out: Path,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    key: str = "text",
) -> dict:
    """Tokenizes `inputs` into the folder `out` and returns what its meta.json says.

    Each line of a .jsonl file and each row of a .parquet file is a document, its text under `key`,
    and so is a .txt file; `<|endoftext|>` comes after it. A document goes to one of the splits as a
    whole, but for a .txt file: it is cut at line ends into parts of about 32 KiB, and each part
    goes to one of the splits. Same inputs give same bytes.

    Raises DataError, also where `out` exists.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # it would wait for itself
        raise DataError('a script that calls prepare() needs: if __name__ == "__main__":')
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    if not out.name:
        raise DataError(f"--out {out}: give the name of a new folder")
    inputs = find_inputs(inputs)
    encoding = load_tokenizer(tokenizer)
    part = out.with_name(f".{out.name}.part")
    try:
        files = {name: path.read_bytes() for name, path in tokenizer_files(tokenizer).items()}
        files["token_bytes.bin"] = token_bytes(encoding).tobytes()
        sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        settings = {"shard_tokens": shard_tokens, "key": key, "val_fraction": val_fraction}
        with _lock(part, out):
            meta = _write_tokens(inputs, tokenizer, encoding, settings | sha256, part)
            meta |= {"tokenizer": Path(tokenizer).name, "files": sha256}
            files["meta.json"] = json.dumps(meta, indent=1).encode() + b"\n"
            for name, content in files.items():
                (part / "data" / name).write_bytes(content)
            os.rename(part / "data", out)
        shutil.rmtree(part, ignore_errors=True)
    except OSError as error:  # of writing: errors of reading are a DataError already
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
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


@contextmanager
def _lock(part: Path, out: Path) -> Iterator[None]:
    """Waits until no other process makes `out`, and has others wait. Raises DataError if `out`
    exists."""
    exists = f"{out}: exists; remove it, or give another --out"
    if out.exists():
        raise DataError(exists)
    part.mkdir(parents=True, exist_ok=True)
    with (part / "lock").open("w") as lock:  # closing it releases the lock, also after an error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on SMB
            print(f"{out}: waiting, as another process makes it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if out.exists():
                raise DataError(exists) from None
        except OSError:
            pass  # some network disks have no locks
        yield


Batch = list[tuple[str, bytes, bool]]  # split, text, whether a document ends here


def _batches(
    inputs: list[tuple[Path, str]], settings: dict, bar: tqdm, items: int, skipped: int
) -> Iterator[tuple[Batch, dict | None]]:
    """The items of the files, about BATCH_BYTES at a time. The last batch of a file comes with what
    to record of it. inputs: files with their fingerprints. items, skipped: of the files before."""
    for path, fingerprint in inputs:
        batch, size = [], 0
        for text, ends_document in read_items(path, settings["key"], bar):
            if not text:
                skipped += 1
                continue
            name = "val" if is_validation(items, settings["val_fraction"]) else "train"
            items += 1
            batch.append((name, text, ends_document))
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch, None
                batch, size = [], 0
        yield batch, {"inputs": fingerprint, "items": items, "skipped": skipped}


@lru_cache(maxsize=1)
def _load_once(tokenizer: str, version: str) -> Encoding:
    """version: changes with the tokenizer's files."""
    return load_tokenizer(tokenizer)


def _encode(tokenizer: str, version: str, batch: Batch) -> dict[str, np.ndarray]:
    """The tokens of a batch's texts, in order, for each split."""
    encoding = _load_once(tokenizer, version)
    end = np.array([encoding.eot_token], np.uint32)
    parts = {"train": [end[:0]], "val": [end[:0]]}
    for name, text, ends_document in batch:
        parts[name].append(encode_to_numpy(encoding, text))
        if ends_document:
            parts[name].append(end)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _workers(number: int) -> Executor:
    """Processes, as tokenizing in threads waits for Python's lock; or one thread."""
    if number == 1:
        return ThreadPoolExecutor(1)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, mp_context=spawn, initializer=_end_with_main)


def _end_with_main() -> None:
    """In a worker: Ctrl-C is for the main process; when that has ended, even by a kill, so does the
    worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: main.join() or os._exit(1), daemon=True).start()


def _write_tokens(
    inputs: list[Path], tokenizer: str, encoding: Encoding, settings: dict, part: Path
) -> dict:
    """Reads, tokenizes on all cores and writes. Returns the meta without the tokenizer. encoding:
    that of `tokenizer`, which the workers load themselves."""
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    known = fingerprints(settings, inputs)
    state = read_state(part / "state.json", known)
    done = known.index(state["inputs"])  # so many files
    (part / "data").mkdir(exist_ok=True)
    sizes = settings["shard_tokens"], dtype.itemsize
    splits = {name: Split(part / "data", name, state[name], *sizes) for name in ("train", "val")}

    running: deque[tuple[Batch, Future, dict | None]] = deque()  # in the order of the input

    def tokens() -> int:
        return state["train"]["tokens"] + state["val"]["tokens"]

    def write_oldest() -> None:
        batch, encoded, record = running[0]
        tokens_of = encoded.result()  # an error leaves the batch first in line, and all after it
        for name, text, ends_document in batch:
            state[name]["bytes"] += len(text)
            state[name]["documents"] += ends_document
        for name, ids in tokens_of.items():
            splits[name].write(ids.astype(dtype))
        if record:
            state.update(record)
            write_state(part / "state.json", state)
        speed = (tokens() - before) / bar.format_dict["elapsed"]
        size = tokens() * dtype.itemsize * bar.total / max(1, bar.n) / 1e9
        bar.set_postfix_str(f"{speed:,.0f} tokens/s, {size:.2f} GB at the end", refresh=False)
        running.popleft()

    before, total = tokens(), [path.stat().st_size for path in inputs]
    workers = min(os.cpu_count() or 1, 1 + sum(total) // WORKER_BYTES)
    # Not at a terminal but in a log file, the bar comes once a minute.
    rare = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60, "maxinterval": 60}
    look = {"desc": "tokenizing", "unit": "B", "unit_scale": True} | rare
    bar = tqdm(total=sum(total), initial=sum(total[:done]), **look)
    left = list(zip(inputs, known[1:]))[done:]
    with bar, _workers(workers) as pool:
        try:
            for batch, record in _batches(left, settings, bar, state["items"], state["skipped"]):
                running.append((batch, pool.submit(_encode, tokenizer, known[0], batch), record))
                if len(running) > 2 * workers:  # reading may not run ahead: memory stays bounded
                    write_oldest()
            while running:
                write_oldest()
        except DataError:  # in one file; those before it are good
            while running:
                write_oldest()
            raise
        except BrokenProcessPool:
            what = "a process that tokenizes has ended: is there enough memory?"
            raise DataError(f"{part}: {what} The same command goes on") from None

    if state["skipped"]:
        print(f"skipped {state['skipped']:,} documents without text", file=sys.stderr)
    for name in splits:
        if not state[name]["tokens"]:
            shutil.rmtree(part, ignore_errors=True)  # soon read again
            what = f"the {name} split would be empty with --val-fraction {settings['val_fraction']}"
            few = "too few documents (32 KiB of a .txt file count as one)"
            raise DataError(f"{what}: {few}; give more text, or another fraction")
    vocabulary = {"vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    return {"dtype": dtype.name} | vocabulary | {name: splits[name].meta() for name in splits}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = "files, folders, or globs in quotes"
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=known)
    known = "gpt2, shipped, a tiktoken rank file, or a Hugging Face folder"
    parser.add_argument("--tokenizer", required=True, help=known)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--key", default="text", help="of .jsonl, or column of .parquet")
    parser.add_argument("--val-fraction", type=float, default=VAL_FRACTION)
    args = parser.parse_args(argv)
    try:
        meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction, key=args.key)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for split in ("train", "val"):
        counts = [f"{meta[split][key]:,} {key}" for key in ("tokens", "bytes", "documents")]
        print(f"{split}: {', '.join(counts)}")
    print(f"{args.out}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
