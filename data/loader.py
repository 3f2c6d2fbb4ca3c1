"""Token files as training batches.

A batch is a pure function of (seed, step). So a resumed run needs no saved state of the loader, and
any number of ranks sees the same data.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError

VERIFY_BYTES = 2**30  # the sha256 of a split up to this size is checked: a second or two


class TokenDataset:
    """One split (`train` or `val`) of a folder that data.prepare made.

    Only the windows asked for are read, so a corpus may be far larger than memory. The sizes of the
    files are always checked. Their sha256 is checked if the split has at most 1 GiB: beyond that, a
    start would take minutes. Token ids are checked against the vocabulary when they are read.

    `bytes` are those of the text, `tokenizer` is what load_tokenizer takes. Raises DataError if the
    folder is missing, damaged or not made by data.prepare, or has fewer than context_length + 1
    tokens.
    """

    def __init__(self, data_dir: str | Path, split: str, context_length: int):
        self.data_dir = Path(data_dir)
        self.context_length = T = context_length
        meta = _read_meta(self.data_dir, split)
        self.digest = hashlib.sha256((self.data_dir / "meta.json").read_bytes()).hexdigest()
        counts, shards = meta[split], meta[split]["shards"]
        self.tokens: int = counts["tokens"]
        self.bytes: int = counts["bytes"]
        self.documents: int = counts["documents"]
        self.bytes_per_token = self.bytes / self.tokens
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.tokenizer: str = meta["tokenizer"]
        self._dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self._paths = [self.data_dir / shard["file"] for shard in shards]
        _check_files(self._paths, shards, self._dtype.itemsize)
        self._sizes = np.array([shard["tokens"] for shard in shards], dtype=np.int64)
        # A process may have about a thousand files open.
        self._open = lru_cache(maxsize=256)(lambda shard: self._paths[shard].open("rb", 0))

        # An epoch reads floor((tokens - T) / T) windows of each shard, one every T tokens. The
        # first starts at an offset drawn for the epoch, so that a window may start anywhere.
        windows = np.where(self._sizes > T, np.maximum(1, (self._sizes - T) // T), 0)
        self._slack = self._sizes - 1 - windows * T  # the largest offset
        self._ends = np.cumsum(windows)  # in an epoch, shard s has windows starts[s] to ends[s] - 1
        self._starts = self._ends - windows
        self.windows_per_epoch = int(self._ends[-1])
        if self.windows_per_epoch == 0:
            raise DataError(
                f"{self.data_dir}: its {split} split has {self.tokens:,} tokens, fewer than one "
                f"window of context_length + 1 = {T + 1:,}; give more text or a shorter context"
            )

    def batch(
        self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens of this rank, both int64 (batch_size // world_size, T).

        Steps count from 1. All ranks together have the same `batch_size` rows for every
        `world_size`: rank r has the r-th contiguous part. In an epoch each window comes once, in an
        order drawn from (seed, epoch). A batch may hold the end of one epoch and the start of the
        next.
        """
        assert step >= 1 and batch_size % world_size == 0 and 0 <= rank < world_size
        rows = batch_size // world_size
        first = (step - 1) * batch_size + rank * rows
        epoch, position = np.divmod(np.arange(first, first + rows), self.windows_per_epoch)

        key = _mix(_mix(np.full(rows, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
        window = _shuffled(position, self.windows_per_epoch, key)
        shard = np.searchsorted(self._ends, window, side="right")
        # (seed, epoch, shard) draws the offset, from 0 to the slack.
        slack = self._slack[shard].astype(np.uint64)
        offset = _mix(key ^ _mix(shard.astype(np.uint64) + np.uint64(1))) % (slack + np.uint64(1))
        start = offset.astype(np.int64) + (window - self._starts[shard]) * self.context_length

        length = self.context_length + 1
        windows = [self._read(s, t, length) for s, t in zip(shard.tolist(), start.tolist())]
        tokens = torch.from_numpy(np.stack(windows))  # (rows, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def in_order(
        self, batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split from front to back, for evaluation: each token but a shard's first is a target
        exactly once. Batches of up to `batch_size` full windows, then the shard's rest as (1, r).

        `max_tokens` stops after so many targets, rounded down to whole windows, but at least one.
        """
        T = self.context_length
        left = self.tokens if max_tokens is None else max(max_tokens, T)
        for shard, size in enumerate(self._sizes.tolist()):
            start = 0
            while start < size - 1:
                rows, length = min(batch_size, (size - 1 - start) // T), T
                if rows == 0:
                    rows, length = 1, size - 1 - start
                rows = min(rows, left // length)
                if rows == 0:
                    return
                tokens = torch.from_numpy(self._read(shard, start, rows * length + 1))
                yield tokens[:-1].view(rows, length), tokens[1:].view(rows, length)
                start, left = start + rows * length, left - rows * length

    def _read(self, shard: int, start: int, count: int) -> np.ndarray:
        """int64 (count,): the shard's tokens from `start` on. A read is cheaper than a memory map:
        mapping one of thousands of shards for a single window costs more than reading the window.
        """
        file, size = self._open(shard), count * self._dtype.itemsize
        file.seek(start * self._dtype.itemsize)
        data = file.read(size)
        if len(data) < size:
            path = self._paths[shard]
            raise DataError(f"{path}: became shorter while it was in use; prepare it again")
        tokens = np.frombuffer(data, self._dtype)
        if tokens.max() >= self.vocab_size:  # the model would read out of bounds
            raise DataError(
                f"{self._paths[shard]}: holds token id {tokens.max()}, past the vocabulary of "
                f"{self.vocab_size:,}; make it again with: python -m data.prepare"
            )
        return tokens.astype(np.int64)


def bigram_loss(train: TokenDataset, val: TokenDataset) -> float | None:
    """Nats per token on `val` of a model that knows only which token follows which in `train`.

    p(y|x) = (count(x, y) + k(x) p(y)) / (count(x) + k(x)), where k(x) is one more than the number
    of different tokens seen after x, and p(y) comes from add-one counts: Witten and Bell (1991).

    Takes one pass over each split. None if the table would have more than 1e8 entries.
    """
    V = train.vocab_size
    if V**2 > 1e8 or val.vocab_size != V:
        return None
    rows = max(1, 2**20 // train.context_length)
    count = np.zeros((V, V), np.uint32)
    for x, y in train.in_order(rows):
        np.add.at(count.reshape(-1), (x * V + y).flatten().numpy(), np.uint32(1))
    total, k = count.sum(axis=1), np.count_nonzero(count, axis=1) + 1
    unigram = count.sum(axis=0) + 1
    unigram = unigram / unigram.sum()
    nats = pairs = 0
    for x, y in val.in_order(rows):
        x, y = x.numpy(), y.numpy()
        nats -= np.log((count[x, y] + k[x] * unigram[y]) / (total[x] + k[x])).sum()
        pairs += x.size
    return float(nats / pairs)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood, 2014): well-mixed uint64. It overflows on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where `position` lands in a pseudo-random permutation of range(n), which its `key` chooses.

    A Feistel network permutes the side**2 >= n points (left, right) of a square. A point that lands
    at n or beyond is permuted again until it lands inside, which gives a permutation of range(n)
    (Black and Rogaway, 2002). Nothing of size n is held in memory.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    x = position.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = np.divmod(x[outside], side)
        round_key = key[outside]
        for _ in range(6):
            round_key = _mix(round_key)
            left, right = right, (left + _mix(round_key ^ right) % side) % side
        x[outside] = left * side + right
        outside = x >= n
    return x.astype(np.int64)


def _read_meta(data_dir: Path, split: str) -> dict:
    """The checked meta.json, in which `tokenizer` becomes what load_tokenizer takes. The folder may
    come from a stranger, so no file is read but those that data.prepare writes."""
    path = data_dir / "meta.json"
    if not path.is_file():
        raise DataError(f"{data_dir}: holds no prepared data; make it with: python -m data.prepare")
    try:
        meta = json.loads(path.read_bytes())
        counts, shards, vocab_size = meta[split], meta[split]["shards"], meta["vocab_size"]
        sizes = [shard["tokens"] for shard in shards]
        numbers = [vocab_size, meta["end_of_text"], *sizes]
        numbers += [counts[key] for key in ("tokens", "bytes", "documents")]
        if (data_dir / "tokenizer.tiktoken").is_file():
            meta["tokenizer"] = str(data_dir / "tokenizer.tiktoken")
        elif (data_dir / "tokenizer.json").is_file():
            meta["tokenizer"] = str(data_dir)
        elif meta["tokenizer"] not in ("gpt2", "shipped"):
            raise ValueError("the tokenizer is neither in the folder nor known")
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a count is not a whole number")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError("dtype is neither uint16 nor uint32")
        if not meta["end_of_text"] < vocab_size <= 256 ** np.dtype(meta["dtype"]).itemsize:
            raise ValueError("vocab_size does not fit dtype and end_of_text")
        names = [f"{split}_{i:03d}.bin" for i in range(len(shards))]
        if [shard["file"] for shard in shards] != names:
            raise ValueError(f"the shards are not {split}_000.bin and so on")
        if sum(sizes) != counts["tokens"] or 0 in (counts["tokens"], counts["bytes"]):
            raise ValueError(f"{split} is empty, or its tokens are not the sum of its shards")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not as data.prepare writes it ({what}); make it again") from None
    return meta


def _check_files(paths: list[Path], shards: list[dict], itemsize: int) -> None:
    verify = sum(shard["tokens"] for shard in shards) * itemsize <= VERIFY_BYTES
    for path, shard in zip(paths, shards):
        if not path.is_file():
            raise DataError(f"{path}: is missing, though meta.json names it; prepare again")
        expected, size = shard["tokens"] * itemsize, path.stat().st_size
        if size != expected:
            what = f"has {size:,} bytes, {expected:,} by meta.json"
            raise DataError(f"{path}: {what}; prepare again")
        if verify and hashlib.sha256(path.read_bytes()).hexdigest() != shard.get("sha256"):
            raise DataError(f"{path}: was altered (its sha256 is not meta.json's); prepare again")
