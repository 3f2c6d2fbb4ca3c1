"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine
    python -m data.prepare --input fineweb/ 'more/*.jsonl.xz' --tokenizer gpt2 --out data/fineweb

Inputs are .txt, .jsonl (one object a line) and .parquet, also compressed (.gz, .xz). The folder
`--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian uint16 or uint32), the
vocabulary (but gpt2's, which tiktoken knows), the bytes of each token (`token_bytes.bin`, uint16),
and `meta.json`, which says what the files hold.

A task is a run of consecutive input files, 64 MiB or more together. One process does it alone and
leaves two shards in a hidden folder beside `--out`, which becomes `--out` as a whole at the end.
After a kill, remove `.NAME-...` and begin afresh."""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.command import UserError, command
from data.text import find_inputs, read_items
from data.tokenizer import all_tokens, encode_to_numpy, load_tokenizer, tokenizer_files

SHIPPED_CORPUS = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
SHIPPED_FOLDER = "data/sotu"  # where TokenDataset looks for its tokens
VAL_FRACTION = 0.05
TASK_BYTES = 2**26  # of input, at least: less is done before another process has started
SPLITS = ("train", "val")
COUNTS = ("tokens", "bytes", "documents")  # bytes of text; documents that end in the split


def is_validation(item: int, fraction: float, task: int = 0) -> bool:
    """Whether item 0, 1, 2, ... of a task is held out: `fraction` of them, evenly spread. By the
    golden ratio, tasks begin at different points, so the share is right over all of them."""
    start = (0.5 + task * (math.sqrt(5) - 1) / 2) % 1
    return math.floor((item + 1) * fraction + start) > math.floor(item * fraction + start)


def prepare(
    inputs: list[str | Path], tokenizer: str, out: str | Path, val_fraction=VAL_FRACTION, key="text"
) -> dict:
    """Tokenizes `inputs` into the folder `out` and returns what its meta.json says. A document is a
    line of .jsonl or a row of .parquet, its text under `key`, or a .txt file; `<|endoftext|>` comes
    after it. It goes to one of the splits as a whole, but a .txt file in parts (data/text.py). Same
    inputs give same bytes, on any number of cores. Raises UserError, also where `out` exists."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or give another --out")
    try:
        tasks = cut_into_tasks(find_inputs(inputs))
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as hidden:
            (folder := Path(hidden, out.name)).mkdir()  # others may read it, as any new folder
            meta = fill(folder, tasks, tokenizer, val_fraction, key)
            os.rename(folder, out)
    except (OSError, BrokenProcessPool) as error:  # the pool breaks where memory runs out
        raise UserError(f"{out}: cannot be made: {error}") from None
    return meta


def prepare_shipped(data_dir: Path) -> None:
    """Makes the tokens of the shipped corpus if `data_dir` is their folder, and not there yet. Each
    rank makes its own, and the first to be done is taken."""
    if data_dir == Path(SHIPPED_FOLDER) and not data_dir.exists():
        try:
            prepare([SHIPPED_CORPUS], "shipped", data_dir)
        except UserError:
            if not data_dir.exists():
                raise


def cut_into_tasks(inputs: list[Path]) -> list[list[Path]]:
    """The input files of each task: TASK_BYTES or more, but for the last one's."""
    tasks, size = [[]], 0
    for path in inputs:
        if size >= TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(path)
        size += path.stat().st_size
    return tasks


def fill(folder: Path, tasks: list[list[Path]], tokenizer: str, fraction: float, key: str) -> dict:
    """Writes all files of a prepared folder, and returns what its meta.json says."""
    encoding = load_tokenizer(tokenizer)
    files = {name: path.read_bytes() for name, path in tokenizer_files(tokenizer).items()}
    files["token_bytes.bin"] = np.fromiter(map(len, all_tokens(encoding)), "<u2").tobytes()
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    make = partial(make_shards, folder, tokenizer, dtype, fraction, key)
    made = make_all(make, list(enumerate(tasks)))

    meta = {"dtype": dtype.name, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    for i, split in enumerate(SPLITS):
        shards = [shards[i] for shards in made if shards[i]["tokens"]]
        meta[split] = {name: sum(shard[name] for shard in shards) for name in COUNTS}
        in_meta = ("file", "tokens", "sha256")
        meta[split]["shards"] = [{name: shard[name] for name in in_meta} for shard in shards]
    if not all(meta[split]["tokens"] for split in SPLITS):
        items = sum(shard["items"] for shards in made for shard in shards)
        few = f"too few for two splits at --val-fraction={fraction}"
        way = f"--val-fraction={1 / items:.2g} would do" if items > 1 else "give more text"
        raise UserError(f"{tasks[0][0]}: {items} documents or pieces of a .txt, {few}; {way}")

    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    meta |= {"tokenizer": Path(tokenizer).name, "files": sha256}
    files["meta.json"] = json.dumps(meta, indent=1).encode() + b"\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return meta


def make_shards(
    folder: Path, tokenizer: str, dtype: np.dtype, fraction: float, key: str, task: tuple
) -> list[dict]:
    """Writes a task's shard of each split, and returns what is in them: COUNTS, the sha256 and the
    number of items (data/text.py). task: its number and its input files."""
    number, inputs = task
    encoding = load_tokenizer(tokenizer)
    none = {"items": 0, "tokens": 0, "bytes": 0, "documents": 0}
    shards = [{"file": f"{split}_{number:03d}.bin", **none} for split in SPLITS]
    digests = [hashlib.sha256() for _ in SPLITS]
    paths = [folder / shard["file"] for shard in shards]
    with paths[0].open("wb") as train, paths[1].open("wb") as val:
        items = (item for path in inputs for item in read_items(path, key) if item[0])
        for i, (text, ends_document) in enumerate(items):
            tokens = encode_to_numpy(encoding, text)
            if ends_document:
                tokens = np.append(tokens, encoding.eot_token)
            content = tokens.astype(dtype).tobytes()
            split = is_validation(i, fraction, number)  # an index of SPLITS
            (train, val)[split].write(content)
            digests[split].update(content)
            shards[split]["items"] += 1
            shards[split]["tokens"] += len(tokens)
            shards[split]["bytes"] += len(text)
            shards[split]["documents"] += ends_document
    return [shard | {"sha256": d.hexdigest()} for shard, d in zip(shards, digests)]


def make_all(make: Callable, tasks: list) -> list:
    """`make` of each task, by processes on all cores: threads would share Python's lock."""
    if len(tasks) == 1:
        return [make(task) for task in tasks]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=end_with_main) as pool:
        try:
            return list(tqdm(pool.map(make, tasks), "tokenizing", len(tasks), delay=10))
        except BaseException:  # an error, or Ctrl-C: other tasks may have hours to go
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def end_with_main() -> None:
    """In a worker: Ctrl-C is for the main process. When that has ended, so does the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: main.join() or os._exit(1), daemon=True).start()


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    path = {"required": True, "type": os.path.expanduser}  # a shell expands no ~ behind a =
    parser.add_argument("--input", **path, nargs="+", help="files, folders, or globs in quotes")
    parser.add_argument("--tokenizer", **path, help="gpt2, shipped, rank file, Hugging Face folder")
    parser.add_argument("--out", **path, help="the folder to make")
    parser.add_argument("--key", default="text", help="of .jsonl, or column of .parquet")
    parser.add_argument("--val-fraction", type=float, default=VAL_FRACTION)
    args = parser.parse_args(argv)
    meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction, key=args.key)
    for split in SPLITS:
        print(f"{split}: {', '.join(f'{meta[split][name]:,} {name}' for name in COUNTS)}")


if __name__ == "__main__":
    sys.exit(main())
