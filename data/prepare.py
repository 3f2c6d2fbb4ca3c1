"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine
    python -m data.prepare --input fineweb/ 'more/*.jsonl.zst' --tokenizer gpt2 --out data/fineweb

Inputs are .txt, .jsonl (one object a line) and .parquet, also compressed (.gz, .xz, .zst). The
folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian uint16 or
uint32), a copy of the vocabulary (except gpt2, which tiktoken knows), the number of bytes of each
token in it (`token_bytes.bin`, uint16), and `meta.json`, which says what the files hold.

A task is a run of input files, 64 MiB or more together. One process does it alone, and leaves a
piece: a folder with the tokens of both splits. At the end the pieces are joined. The folder `--out`
appears as a whole or not at all; until then all is in a hidden folder beside it, `.NAME.part`.
After a kill or an error, the same command does the tasks that have no piece yet, and ends in the
same bytes. To give up, remove that folder.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from data import DataError
from data.text import Input, find_inputs, read_items
from data.tokenizer import Encoding, encode_to_numpy, load_tokenizer, token_bytes, tokenizer_files

SHIPPED_CORPUS = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
SHIPPED_FOLDER = "data/sotu"  # where train.py looks for its tokens
VAL_FRACTION = 0.05
SHARD_TOKENS = 2**28  # 512 MiB a file in uint16
TASK_BYTES = 2**26  # of input: less is done before another process has started
REPORT_TOKENS = 2**18  # how often a task says how far it is
SPLITS = ("train", "val")
COUNTS = ("tokens", "bytes", "documents")  # bytes of text; documents that end in the split


def is_validation(item: int, fraction: float) -> bool:
    """Whether item 0, 1, 2, ... of a task is held out: `fraction` of them, evenly spread."""
    return math.floor((item + 1) * fraction + 0.5) > math.floor(item * fraction + 0.5)


def prepare(
    inputs: list[str | Path],
    tokenizer: str,
    out: str | Path,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    key: str = "text",
) -> dict:
    """Tokenizes `inputs` into the folder `out` and returns what its meta.json says.

    Each line of a .jsonl file and each row of a .parquet file is a document, its text under `key`,
    and so is a .txt file; `<|endoftext|>` comes after it. A document goes to one of the splits as a
    whole, but for a .txt file: it is cut at line ends into parts of about 32 KiB, and each part
    goes to one of the splits. Same inputs give same bytes, on any number of cores.

    Raises DataError, also where `out` exists.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # it would wait for itself
        raise DataError('a script that calls prepare() needs: if __name__ == "__main__":')
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    out, tokenizer = Path(os.path.expanduser(out)), os.path.expanduser(tokenizer)
    if not out.name:
        raise DataError(f"--out {out}: give the name of a new folder")
    inputs, encoding = find_inputs(inputs), load_tokenizer(tokenizer)
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    part = out.with_name(f".{out.name}.part")
    try:
        files = {name: path.read_bytes() for name, path in tokenizer_files(tokenizer).items()}
        files["token_bytes.bin"] = token_bytes(encoding).tobytes()
        sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        with _lock(part, out):
            for left_over in part.glob("*.tmp"):  # by a kill
                shutil.rmtree(left_over)
            settings = (tokenizer, sha256, dtype, key, val_fraction)
            tasks = [Task(part, i, run, *settings) for i, run in enumerate(_cut(inputs))]
            counts = _do(tasks)
            if skipped := counts[:, 2, 2].sum():
                print(f"skipped {skipped:,} documents without text", file=sys.stderr)
            (joined := part / "joined.tmp").mkdir()
            meta = {"dtype": dtype.name, "vocab_size": encoding.n_vocab}
            meta |= {"end_of_text": encoding.eot_token}
            for i, name in enumerate(SPLITS):
                meta[name] = _join(tasks, name, counts[:, i], shard_tokens, joined)
            meta |= {"tokenizer": Path(tokenizer).name, "files": sha256}
            files["meta.json"] = json.dumps(meta, indent=1).encode() + b"\n"
            for name, content in files.items():
                (joined / name).write_bytes(content)
            os.rename(joined, out)
        shutil.rmtree(part, ignore_errors=True)
    except BrokenProcessPool:
        what = "a process that tokenizes has ended: is there enough memory?"
        raise DataError(f"{part}: {what} The same command goes on") from None
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
    lock = FileLock(part / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{out}: waiting, as another process makes it", file=sys.stderr)
        with suppress(FileNotFoundError):  # the other process has removed `part`
            lock.acquire()
    except OSError:  # some network disks have no locks; there, filelock before 3.30 waits for ever
        pass
    try:
        if out.exists():  # by now
            shutil.rmtree(part, ignore_errors=True)
            raise DataError(exists)
        yield
    finally:
        lock.release()


def _cut(inputs: list[Input]) -> list[list[Input]]:
    """Into runs of TASK_BYTES or more. The last one is the rest."""
    runs, size = [], TASK_BYTES
    for file in inputs:
        if size >= TASK_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(file)
        size += file.size
    return runs


@dataclass
class Task:
    """Some files, and what to make of them: a piece. That is a folder with the tokens of both
    splits and their counts, which is renamed as a whole, so it is there or not."""

    part: Path = field(repr=False)  # the folder around the pieces
    number: int
    inputs: list[Input]
    tokenizer: str = field(repr=False)
    sha256: dict[str, str]  # of the tokenizer's files
    dtype: np.dtype
    key: str
    val_fraction: float

    @cached_property
    def piece(self) -> Path:
        """Its name has a digest of all that decides what it holds."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        return self.part / f"{self.number:05d}_{digest[:32]}"

    def size(self) -> int:
        """Bytes of input."""
        return sum(file.size for file in self.inputs)

    def report(self, read: int, tokens: int) -> None:
        """Tells the main process how far the task is. Raises OSError if it wants no more."""
        if (self.part / "stop.tmp").exists():
            raise InterruptedError
        with (self.part / "progress").open("r+b") as file:
            file.seek(16 * self.number)
            file.write(np.array([read, tokens]))

    def do(self) -> None:
        """Reads, tokenizes, and writes the piece."""
        encoding = _load_once(self.tokenizer, str(self.sha256))
        end = np.array([encoding.eot_token], self.dtype)
        counts = [[0, 0, 0] for _ in (*SPLITS, "skipped")]
        items = read = reported = 0
        aside = self.piece.with_suffix(f".{os.getpid()}.tmp")
        aside.mkdir()
        with (aside / "train").open("wb") as train, (aside / "val").open("wb") as val:
            for path, size, _ in self.inputs:
                for text, ends_document, position in read_items(path, self.key):
                    if not text:
                        counts[2][2] += 1
                        continue
                    split = int(is_validation(items, self.val_fraction))
                    items += 1
                    tokens = encode_to_numpy(encoding, text).astype(self.dtype)
                    (train, val)[split].write(tokens)
                    if ends_document:
                        (train, val)[split].write(end)
                    counts[split][0] += len(tokens) + ends_document
                    counts[split][1] += len(text)
                    counts[split][2] += ends_document
                    written = counts[0][0] + counts[1][0]
                    if written - reported >= REPORT_TOKENS:
                        self.report(read + position, written)
                        reported = written
                read += size
        np.array(counts, np.int64).tofile(aside / "counts")
        os.rename(aside, self.piece)
        self.report(read, counts[0][0] + counts[1][0])

    def counts(self) -> np.ndarray:
        """int64 (3, 3): COUNTS of the piece's train, its val, and what had no text. Raises
        DataError."""
        with suppress(OSError, ValueError):
            counts = np.fromfile(self.piece / "counts", np.int64).reshape(3, 3)
            sizes = [(self.piece / name).stat().st_size for name in SPLITS]
            if sizes == (counts[:2, 0] * self.dtype.itemsize).tolist():
                return counts
        raise DataError(f"{self.piece}: is damaged; remove it, and the same command makes it again")


@lru_cache(maxsize=1)
def _load_once(tokenizer: str, version: str) -> Encoding:
    """version: changes with the tokenizer's files."""
    return load_tokenizer(tokenizer)


def _do(tasks: list[Task]) -> np.ndarray:
    """Does those that have left no piece yet: in processes on all cores, as tokenizing in threads
    waits for Python's lock; one task alone, in a thread. Returns the counts of all: int64 (tasks,
    3, 3). Raises DataError."""
    part, progress = tasks[0].part, tasks[0].part / "progress"  # int64 (tasks, 2)
    if set(part.glob("[0-9]*_*")) - {task.piece for task in tasks}:
        what = "was begun with other arguments, or an input file that was read has changed"
        raise DataError(f"{part}: {what}; remove it to start anew")
    np.zeros((len(tasks), 2), np.int64).tofile(progress)
    left = []
    for task in tasks:
        if task.piece.exists():
            task.report(task.size(), task.counts()[:2, 0].sum())
        else:
            left.append(task)

    def progress_so_far() -> list[int]:
        return np.fromfile(progress, np.int64).reshape(-1, 2).sum(axis=0).tolist()

    workers = min(os.cpu_count() or 1, len(left), 61 if os.name == "nt" else len(left))
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_main)
    else:
        pool = ThreadPoolExecutor(1)
    # Not at a terminal but in a log file, the bar comes once a minute.
    rare = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60, "maxinterval": 60}
    look = {"desc": "tokenizing", "unit": "B", "unit_scale": True} | rare
    (done, before), total = progress_so_far(), sum(task.size() for task in tasks)
    with tqdm(total=total, initial=done, **look) as bar, pool:
        try:
            running = [pool.submit(task.do) for task in left]
            while running:
                ended, running = wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                read, tokens = progress_so_far()
                speed = (tokens - before) / bar.format_dict["elapsed"]
                size = tokens * tasks[0].dtype.itemsize * total / max(1, read) / 1e9
                what = f"{speed:,.0f} tokens/s, {size:.2f} GB at the end"
                bar.set_postfix_str(what, refresh=False)
                bar.update(read - bar.n)
        except BaseException:  # an error, or Ctrl-C: other tasks may have hours to go
            (part / "stop.tmp").mkdir()
            pool.shutdown(cancel_futures=True)
            raise
    return np.array([task.counts() for task in tasks])


def _end_with_main() -> None:
    """In a worker: Ctrl-C is for the main process; when that has ended, even by a kill, so does the
    worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: main.join() or os._exit(1), daemon=True).start()


def _join(
    tasks: list[Task], name: str, counts: np.ndarray, shard_tokens: int, folder: Path
) -> dict:
    """Writes the tokens that the pieces have of one split as shards, on all cores. counts: int64
    (tasks, 3), COUNTS of the pieces. Returns what meta.json says of the split. Raises DataError if
    it is empty."""
    ends = counts[:, 0].cumsum().tolist()  # the token at which each piece ends
    if not ends[-1]:
        shutil.rmtree(tasks[0].part, ignore_errors=True)  # soon made again
        what = f"the {name} split would be empty with --val-fraction {tasks[0].val_fraction}"
        few = "too few documents (32 KiB of a .txt file count as one)"
        raise DataError(f"{what}: {few}; give more text, or another fraction")

    def write(shard: int) -> dict:
        first, last = shard * shard_tokens, min((shard + 1) * shard_tokens, ends[-1])
        path, digest = folder / f"{name}_{shard:03d}.bin", hashlib.sha256()
        with path.open("wb") as file:
            for task, start, end in zip(tasks, [0, *ends], ends):
                if max(start, first) < min(end, last):  # mapped, as it may be larger than memory
                    tokens = np.memmap(task.piece / name, task.dtype, "r")
                    tokens = tokens[max(0, first - start) : last - start]
                    file.write(tokens)
                    digest.update(tokens)
        return {"file": path.name, "tokens": last - first, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor() as threads:  # to write and to hash needs no lock of Python's
        shards = list(threads.map(write, range(math.ceil(ends[-1] / shard_tokens))))
    return dict(zip(COUNTS, counts.sum(axis=0).tolist())) | {"shards": shards}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = "files, folders, or globs in quotes"
    parser.add_argument("--input", nargs="+", required=True, help=known)
    known = "gpt2, shipped, a tiktoken rank file, or a Hugging Face folder"
    parser.add_argument("--tokenizer", required=True, help=known)
    parser.add_argument("--out", required=True, help="the folder to make")
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
    for split in SPLITS:
        print(f"{split}: {', '.join(f'{meta[split][key]:,} {key}' for key in COUNTS)}")
    print(f"{args.out}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
