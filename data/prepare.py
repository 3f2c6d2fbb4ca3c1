"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt b.jsonl.gz --tokenizer shipped --out data/my
    python -m data.prepare --input web/ 'b/*.jsonl.xz' --tokenizer gpt2 --out data/web

Inputs are .txt, .jsonl (one object a line) and .parquet files, also compressed (.gz,
.xz). The folder `--out` gets these files:

- `train_000.bin`, `val_000.bin`, ...: the tokens, little-endian uint16 or uint32
- the files of the tokenizer, except for gpt2, which tiktoken knows
- `token_bytes.bin`: how many bytes each token of the vocabulary has, uint16
- `meta.json`: what the other files hold

The inputs are cut into tasks: consecutive files that have 64 MiB or more together. One
process does a task alone, and writes one shard for each split. All files are written
into a hidden folder beside `--out`, which is renamed at the end. If the command is
killed, remove the hidden folder `.NAME-...` and run the command again.
"""

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
from data.text import Items, find_inputs, read_items
from data.tokenizer import all_tokens, encode_to_numpy, load_tokenizer, tokenizer_files

SHIPPED_CORPUS = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
SHIPPED_FOLDER = "data/sotu"  # TokenDataset looks for the tokens of the corpus here
VAL_FRACTION = 0.05
# A smaller task would be done before another process has started.
TASK_BYTES = 2**26
SPLITS = ("train", "val")
# Of a split: its tokens, the bytes of its text, and the documents that end in it
COUNTS = ("tokens", "bytes", "documents")


def is_validation(item: int, fraction: float, task: int = 0) -> bool:
    """Returns whether an item (0, 1, 2, ...) of a task goes to the validation split.

    `fraction` of the items go there, evenly spread. Each task begins at another point,
    which the golden ratio gives, so that many small tasks hold out this fraction, too.
    """
    golden_ratio = (math.sqrt(5) - 1) / 2
    start = (0.5 + task * golden_ratio) % 1
    held_out_before = math.floor(item * fraction + start)
    held_out_after = math.floor((item + 1) * fraction + start)
    return held_out_after > held_out_before


def prepare(
    inputs: list[str | Path],
    tokenizer: str,
    out: str | Path,
    val_fraction: float = VAL_FRACTION,
    key: str = "text",
) -> dict:
    """Tokenizes `inputs` into the folder `out`, and returns what its meta.json says.

    A document is a line of a .jsonl file, a row of a .parquet file, or a whole .txt
    file. Lines and rows have their text under `key`. `<|endoftext|>` follows each
    document. A document goes to one of the splits as a whole, but a .txt file in parts
    (see data/text.py). The same inputs give the same bytes on any number of cores.

    Raises UserError if an argument or an input is bad, or if `out` exists or cannot be
    made.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: should lie between 0 and 1")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or give another --out")
    try:
        tasks = cut_into_tasks(find_inputs(inputs))
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
        with hidden as parent:
            # `out` is a new folder inside the temporary one, because only the owner may
            # read a temporary folder.
            folder = Path(parent, out.name)
            folder.mkdir()
            meta = fill(folder, tasks, tokenizer, val_fraction, key)
            os.rename(folder, out)
    except (OSError, BrokenProcessPool) as error:  # out of memory breaks the pool
        raise UserError(f"{out}: cannot be made: {error}") from None
    return meta


def prepare_shipped(data_dir: Path) -> None:
    """Prepares the shipped corpus if `data_dir` is its folder and does not exist yet.

    Each rank of a run makes a folder of its own, and the first one to be done is used.
    """
    if data_dir != Path(SHIPPED_FOLDER) or data_dir.exists():
        return
    try:
        prepare([SHIPPED_CORPUS], "shipped", data_dir)
    except UserError:
        made_by_another_rank = data_dir.exists()
        if not made_by_another_rank:
            raise


def cut_into_tasks(inputs: list[Path]) -> list[list[Path]]:
    """Returns the input files of each task, with TASK_BYTES or more.

    The last task may have less.
    """
    tasks = [[]]
    size = 0
    for path in inputs:
        if size >= TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(path)
        size += path.stat().st_size
    return tasks


def fill(
    folder: Path, tasks: list[list[Path]], tokenizer: str, fraction: float, key: str
) -> dict:
    """Writes all files of a prepared folder, and returns what its meta.json says."""
    encoding = load_tokenizer(tokenizer)
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    files = {}
    for name, path in tokenizer_files(tokenizer).items():
        files[name] = path.read_bytes()
    token_bytes = np.fromiter(map(len, all_tokens(encoding)), "<u2")
    files["token_bytes.bin"] = token_bytes.tobytes()

    make = partial(make_shards, folder, tokenizer, dtype, fraction, key)
    shards_of_tasks = make_all(make, list(enumerate(tasks)))

    meta = {
        "dtype": dtype.name,
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding.eot_token,
    }
    for i, split in enumerate(SPLITS):
        meta[split] = describe_split([shards[i] for shards in shards_of_tasks])
    check_splits(meta, shards_of_tasks, fraction, first_input=tasks[0][0])

    meta["tokenizer"] = Path(tokenizer).name
    meta["files"] = {}
    for name, content in files.items():
        meta["files"][name] = hashlib.sha256(content).hexdigest()
    files["meta.json"] = json.dumps(meta, indent=1).encode() + b"\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return meta


def describe_split(shards: list[dict]) -> dict:
    """Returns what meta.json says about a split: its COUNTS and its shards.

    Shards without tokens are left out.
    """
    shards = [shard for shard in shards if shard["tokens"]]
    description = {}
    for name in COUNTS:
        description[name] = sum(shard[name] for shard in shards)
    description["shards"] = []
    for shard in shards:
        entry = {name: shard[name] for name in ("file", "tokens", "sha256")}
        description["shards"].append(entry)
    return description


def check_splits(
    meta: dict, shards_of_tasks: list[list[dict]], fraction: float, first_input: Path
) -> None:
    """Raises UserError if a split has no tokens."""
    if all(meta[split]["tokens"] for split in SPLITS):
        return
    items = 0
    for shards in shards_of_tasks:
        items += sum(shard["items"] for shard in shards)
    problem = f"{items} documents or pieces of a .txt, too few for two splits"
    advice = "give more text"
    if items > 1:
        advice = f"--val-fraction={1 / items:.2g} would do"
    raise UserError(f"{first_input}: {problem} at --val-fraction={fraction}; {advice}")


def make_shards(
    folder: Path,
    tokenizer: str,
    dtype: np.dtype,
    fraction: float,
    key: str,
    task: tuple[int, list[Path]],
) -> list[dict]:
    """Writes a task's shard of each split, and returns what the shards hold.

    For each one, that is its file, its number of items (see data/text.py), its COUNTS
    and its sha256. `task` is the number of the task and its input files.
    """
    number, inputs = task
    encoding = load_tokenizer(tokenizer)
    shards = []
    for split in SPLITS:
        shard = {"file": f"{split}_{number:03d}.bin", "items": 0}
        shards.append(shard | dict.fromkeys(COUNTS, 0))
    digests = [hashlib.sha256() for _ in SPLITS]
    train_path, val_path = [folder / shard["file"] for shard in shards]

    with train_path.open("wb") as train, val_path.open("wb") as val:
        outputs = (train, val)
        for item, (text, ends_document) in enumerate(items_with_text(inputs, key)):
            tokens = encode_to_numpy(encoding, text)
            if ends_document:
                tokens = np.append(tokens, encoding.eot_token)
            content = tokens.astype(dtype).tobytes()

            split = int(is_validation(item, fraction, number))  # an index of SPLITS
            outputs[split].write(content)
            digests[split].update(content)
            shard = shards[split]
            shard["items"] += 1
            shard["tokens"] += len(tokens)
            shard["bytes"] += len(text)
            shard["documents"] += ends_document

    for shard, digest in zip(shards, digests):
        shard["sha256"] = digest.hexdigest()
    return shards


def items_with_text(inputs: list[Path], key: str) -> Items:
    """Yields the items of all inputs, except those without text."""
    for path in inputs:
        for text, ends_document in read_items(path, key):
            if text:
                yield text, ends_document


def make_all(make: Callable, tasks: list) -> list:
    """Returns `make(task)` for each task. Processes on all cores share the work.

    Threads would not help, because they share Python's lock.
    """
    if len(tasks) == 1:
        return [make(tasks[0])]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=end_with_main) as pool:
        try:
            results = pool.map(make, tasks)
            return list(tqdm(results, "tokenizing", len(tasks), delay=10))
        except BaseException:
            # After an error or Ctrl-C, the pool would wait for tasks that take hours.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def end_with_main() -> None:
    """Makes a worker ignore Ctrl-C, and end as soon as the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_after_main, daemon=True).start()


def exit_after_main() -> None:
    """Waits until the main process has ended, then ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    # A shell does not expand a ~ that stands behind a =.
    path = os.path.expanduser
    parser.add_argument(
        "--input",
        type=path,
        nargs="+",
        required=True,
        help="files, folders, or globs in quotes",
    )
    parser.add_argument(
        "--tokenizer",
        type=path,
        required=True,
        help="gpt2, shipped, a rank file or a Hugging Face folder",
    )
    parser.add_argument("--out", type=path, required=True, help="the folder to make")
    parser.add_argument(
        "--key",
        default="text",
        help="key in .jsonl, or column of .parquet, of the text",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=VAL_FRACTION,
        help="share of the documents to hold out for validation",
    )
    args = parser.parse_args(argv)
    meta = prepare(args.input, args.tokenizer, args.out, args.val_fraction, args.key)
    for split in SPLITS:
        counts = [f"{meta[split][name]:,} {name}" for name in COUNTS]
        print(f"{split}: {', '.join(counts)}")


if __name__ == "__main__":
    sys.exit(main())
