"""Text files to token files, for corpora larger than memory, on all cores.

    python -m data.prepare --input my.txt more.jsonl.gz --tokenizer shipped --out data/mine
    python -m data.prepare --input fineweb/ 'more/*.jsonl.zst' --tokenizer gpt2 --out data/fineweb

Inputs are .txt, .jsonl (one object a line) and .parquet, also compressed (.gz, .xz, .zst). The
folder `--out` gets the tokens (`train_000.bin`, `val_000.bin`, ..., little-endian uint16 or
uint32), a copy of the vocabulary (except gpt2, which tiktoken knows), the number of bytes of each
token in it (`token_bytes.bin`, uint16), and `meta.json`, which says what the files hold.

A task is a run of input files, 64 MiB or more together. One process makes its two shards, in
`.NAME.part` beside `--out`, which appears as a whole at the end. After a kill or an error, the same
command goes on with the shards that are missing."""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.command import UserError, command, lock
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
    out, encoding = Path(out), load_tokenizer(tokenizer)
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    meta = {"dtype": dtype.name, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    part, locked = out.parent / f".{out.name}.part", ExitStack()
    try:
        inputs = find_inputs(inputs)
        files = {name: path.read_bytes() for name, path in tokenizer_files(tokenizer).items()}
        files["token_bytes.bin"] = np.fromiter(map(len, all_tokens(encoding)), "<u2").tobytes()
        sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        settings = (tokenizer, dtype, key, val_fraction, sha256)  # all that decides, but for inputs
        lock(part, f"--out={out}", locked)
        if out.exists():
            raise UserError(f"{out}: exists; remove it, or give another --out")
        tasks = _cut(part, inputs, settings)
        # Read until there is an item for each split: without one, all the work would be in vain
        held_out = (
            is_validation(item, val_fraction, task)
            for task, paths in enumerate(tasks.values())
            for item, _ in enumerate(x for path in paths for x, _ in read_items(path, key) if x)
        )
        first, items = next(held_out, None), 1
        for other in held_out:
            items += 1
            if other != first:
                break
        else:
            what = f"{items} documents or pieces of a .txt, too few for two splits"
            way = f"--val-fraction={1 / items:.2g} would do" if items > 1 else "give more text"
            raise UserError(f"{inputs[0]}: {what} at {val_fraction=}; {way}")
        left = [(done, paths, settings) for done, paths in tasks.items() if not done.exists()]
        if len(left) == len(tasks):  # what a kill left may be of other arguments
            shutil.rmtree(part / "shards", ignore_errors=True)
        (shards := part / "shards").mkdir(exist_ok=True)
        _make_all(left)
        _cut(part, inputs, settings)  # has a file changed meanwhile?
        made = [json.loads(path.read_bytes()) for path in tasks]
        for split in SPLITS:
            counts = [of_task[split] for of_task in made]
            meta[split] = {name: sum(count[name] for count in counts) for name in COUNTS}
            shard = ("file", "tokens", "sha256")
            meta[split]["shards"] = [{k: c[k] for k in shard} for c in counts if c["tokens"]]
        meta |= {"tokenizer": Path(tokenizer).name, "files": sha256}
        files["meta.json"] = json.dumps(meta, indent=1).encode() + b"\n"
        for name, content in files.items():
            (shards / name).write_bytes(content)
        os.rename(shards, out)
    except (OSError, BrokenProcessPool) as error:  # the pool breaks where memory runs out
        raise UserError(f"{out}: cannot be made: {error}") from None
    finally:
        locked.close()  # or Windows would not remove it
        if out.exists() and not (part / "shards").exists():  # it has become `out`
            shutil.rmtree(part, ignore_errors=True)
    return meta


def prepare_shipped(data_dir: Path) -> None:
    """Makes the tokens of the shipped corpus if `data_dir` is their folder, and not there yet. Each
    process makes its own, and the first is taken: ranks may share a disk without locks."""
    if data_dir == Path(SHIPPED_FOLDER) and not data_dir.exists():
        (folder := data_dir.parent).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sotu-", dir=folder) as own, suppress(OSError):
            prepare([SHIPPED_CORPUS], "shipped", f"{own}/sotu")
            os.rename(f"{own}/sotu", data_dir)  # fails where another was faster


def _cut(part: Path, inputs: list[Path], settings: tuple) -> dict[Path, list[Path]]:
    """Tasks of TASK_BYTES or more, and the rest: a file to come when one is done -> input files.
    Its name has a digest of all that decides. Raises UserError where there are others."""
    tasks, files, size = {}, [], 0
    for path in inputs:
        stat = path.stat()
        files.append((path, stat.st_size, stat.st_mtime_ns))
        size += stat.st_size
        if size >= TASK_BYTES or path is inputs[-1]:
            digest = hashlib.sha256(repr((files, settings, len(tasks))).encode()).hexdigest()
            tasks[part / f"{len(tasks):03d}_{digest[:32]}.json"] = [path for path, _, _ in files]
            files, size = [], 0
    if set(part.glob("*.json")) - set(tasks):
        raise UserError(f"{part}: of other arguments, or an input file has changed; remove it")
    return tasks


def _make_shards(done: Path, inputs: list[Path], settings: tuple) -> None:
    """Writes the task's shard of each split, and at last, in `done`, what meta.json says of it."""
    tokenizer, dtype, key, val_fraction, _ = settings
    encoding, task = load_tokenizer(tokenizer), int(done.name.split("_")[0])
    paths = [done.parent / "shards" / f"{split}_{task:03d}.bin" for split in SPLITS]
    digests = [hashlib.sha256() for _ in SPLITS]
    counts = [{"file": path.name} | dict.fromkeys(COUNTS, 0) for path in paths]
    with paths[0].open("wb") as train, paths[1].open("wb") as val:
        items = (item for path in inputs for item in read_items(path, key) if item[0])
        for i, (text, ends_document) in enumerate(items):
            split = is_validation(i, val_fraction, task)  # an index of SPLITS
            tokens = encode_to_numpy(encoding, text)
            if ends_document:
                tokens = np.append(tokens, encoding.eot_token)
            (train, val)[split].write(content := tokens.astype(dtype).tobytes())
            digests[split].update(content)
            for name, n in zip(COUNTS, (len(tokens), len(text), ends_document)):
                counts[split][name] += n
        for file in (train, val):  # or a power cut could leave an empty one
            file.flush()
            os.fsync(file.fileno())
    for count, digest in zip(counts, digests):
        count["sha256"] = digest.hexdigest()
    done.with_suffix(".tmp").write_text(json.dumps(dict(zip(SPLITS, counts))))
    os.rename(done.with_suffix(".tmp"), done)


def _make_all(tasks: list[tuple]) -> None:
    """_make_shards of each task, by processes on all cores: threads would share Python's lock."""
    if len(tasks) < 2 or os.cpu_count() == 1:  # here
        for task in tasks:
            _make_shards(*task)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=end_with_main) as pool:
        try:
            made = pool.map(_make_shards, *zip(*tasks))
            list(tqdm(made, "tokenizing", len(tasks), delay=10))
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
