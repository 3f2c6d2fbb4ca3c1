"""Token files as training batches. A batch is a pure function of (seed, step), so that a resumed
run needs no loader state and any number of ranks sees the same data."""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data import DataError

VERIFY_BYTES = 2**30  # up to here a split's sha256 is checked: a second or two
CHUNK_TOKENS = 2**22  # what a pass over a whole split holds at a time


class TokenDataset:
    """One split (`train` or `val`) of a folder that data.prepare made.

    Only the windows asked for are read, so a corpus may be far larger than memory. The sizes of
    files are checked always; their sha256 when the split is at most 1 GiB, beyond which starting
    would take minutes; token ids against the vocabulary whenever they are read.

    Attributes: `tokens`, `bytes` (of the text, as UTF-8), `documents`, `bytes_per_token`,
    `vocab_size`, `end_of_text` (its id), `tokenizer` (what load_tokenizer takes).

    Raises DataError where the folder is missing, foreign, damaged, or too small for one window of
    `context_length` tokens and the token after it.
    """

    def __init__(self, data_dir: str | Path, split: str, context_length: int):
        self.data_dir = Path(data_dir)
        self.context_length = context_length
        meta = _read_meta(self.data_dir, split)
        counts = meta[split]
        shards = counts["shards"]
        self.tokens: int = counts["tokens"]
        self.bytes: int = counts["bytes"]
        self.documents: int = counts["documents"]
        self.bytes_per_token = self.bytes / self.tokens
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.tokenizer: str = meta["tokenizer"]
        if (self.data_dir / "tokenizer.tiktoken").is_file():
            self.tokenizer = str(self.data_dir / "tokenizer.tiktoken")
        elif (self.data_dir / "tokenizer.json").is_file():
            self.tokenizer = str(self.data_dir)

        self._dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self._paths = [self.data_dir / shard["file"] for shard in shards]
        self._sizes = np.array([shard["tokens"] for shard in shards], dtype=np.int64)
        _check_files(self.data_dir, shards, self._dtype.itemsize)
        # A process may have about a thousand files open.
        self._open = lru_cache(maxsize=256)(self._open_shard)

        # An epoch reads floor((tokens - T) / T) windows of every shard, at stride T from an offset
        # that is drawn anew, from at least T of them (or all), so that every start has its turn.
        T = context_length
        windows = np.where(self._sizes > T, np.maximum(1, (self._sizes - T) // T), 0)
        self._slack = self._sizes - 1 - windows * T
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
        `world_size`, rank r the r-th contiguous part. Within an epoch each window comes once, in an
        order drawn from (seed, epoch); a batch may hold the end of one and the start of the next.
        """
        assert step >= 1 and batch_size % world_size == 0 and 0 <= rank < world_size
        rows = batch_size // world_size
        first = (step - 1) * batch_size + rank * rows
        epoch, position = np.divmod(np.arange(first, first + rows), self.windows_per_epoch)

        key = _mix(_mix(np.full(rows, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
        window = _shuffled(position, self.windows_per_epoch, key)
        shard = np.searchsorted(self._ends, window, side="right")
        # (seed, epoch, shard) also draws the offset from 0 to the slack, both included.
        slack = self._slack[shard].astype(np.uint64)
        offset = _mix(key ^ _mix(shard.astype(np.uint64) + np.uint64(1))) % (slack + np.uint64(1))
        start = offset.astype(np.int64) + (window - self._starts[shard]) * self.context_length

        length = self.context_length + 1
        tokens = np.empty((rows, length), np.int64)
        for row, (s, t) in enumerate(zip(shard.tolist(), start.tolist(), strict=True)):
            tokens[row] = self._read(s, t, length)
        self._check_ids(tokens)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())

    def in_order(
        self, batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split front to back, for evaluation: every token but a shard's first is a target
        exactly once. Batches of up to `batch_size` full windows, then the shard's rest as (1, r).

        `max_tokens` stops after so many targets, rounded down to whole windows, but not below one.
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
                end = start + rows * length
                tokens = self._read(shard, start, end + 1 - start)
                self._check_ids(tokens)
                x, y = tokens[:-1].copy(), tokens[1:].copy()
                yield torch.from_numpy(x).view(rows, -1), torch.from_numpy(y).view(rows, -1)
                start, left = end, left - rows * length

    def _check_ids(self, tokens: np.ndarray) -> None:
        """An id past the vocabulary would have the model read out of bounds."""
        if tokens.max() >= self.vocab_size:
            raise DataError(
                f"{self.data_dir}: holds token id {tokens.max()}, past its vocabulary of "
                f"{self.vocab_size:,}; make it again with: python -m data.prepare"
            )

    def _open_shard(self, shard: int) -> BinaryIO:
        return self._paths[shard].open("rb", buffering=0)

    def _read(self, shard: int, start: int, count: int) -> np.ndarray:
        """int64 (count,): the shard's tokens from `start` on. A read, not a memory map: mapping one
        of thousands of shards and faulting its page in costs more than reading a window of it.
        """
        file, size = self._open(shard), count * self._dtype.itemsize
        file.seek(start * self._dtype.itemsize)
        data = file.read(size)
        if len(data) < size:
            path = self._paths[shard]
            raise DataError(f"{path}: became shorter while it was in use; prepare it again")
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def _pairs(self) -> Iterator[np.ndarray]:
        """All adjacent pairs within shards as first * vocab_size + second, a chunk at a time."""
        for shard, size in enumerate(self._sizes.tolist()):
            for start in range(0, size - 1, CHUNK_TOKENS):
                tokens = self._read(shard, start, min(CHUNK_TOKENS + 1, size - start))
                self._check_ids(tokens)
                yield tokens[:-1] * self.vocab_size + tokens[1:]


def bigram_loss(train: TokenDataset, val: TokenDataset) -> float | None:
    """Nats per token on `val` of a model that knows only which token follows which in `train`.

    p(y|x) = (count(x, y) + strength * p(y)) / (count(x) + strength), where p(y) is the add-one
    unigram: Dirichlet smoothing (MacKay and Peto, 1995). The strength is the power of two that is
    best on `val` itself, so that the baseline is, if anything, too good.

    Takes one pass over each split. None when the table would have more than 1e8 entries.
    """
    V = train.vocab_size
    if V**2 > 1e8 or val.vocab_size != V:
        return None
    counts = np.zeros(V * V, np.uint32)
    for pairs in train._pairs():
        np.add.at(counts, pairs, np.uint32(1))
    held_out = np.zeros(V * V, np.uint32)
    for pairs in val._pairs():
        np.add.at(held_out, pairs, np.uint32(1))

    table = counts.reshape(V, V)
    context = table.sum(axis=1, dtype=np.float64)
    unigram = table.sum(axis=0, dtype=np.float64) + 1
    unigram /= unigram.sum()
    seen = np.flatnonzero(held_out)  # only pairs that occur in val have a say
    x, y = np.divmod(seen, V)
    weight = held_out[seen] / held_out[seen].sum(dtype=np.float64)
    losses = []
    for strength in 2.0 ** np.arange(0, 17):
        probability = (counts[seen] + strength * unigram[y]) / (context[x] + strength)
        losses.append(-(weight * np.log(probability)).sum())
    return float(min(losses))


# ---- a random order that is computed, not stored ---------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood, 2014): uint64 to well-mixed uint64; wraps on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where `position` lands in a pseudo-random permutation of range(n), each chosen by its `key`.

    A Feistel network permutes the side**2 >= n points (left, right) of a square, and whoever lands
    at n or beyond walks on until inside, which again is a permutation (Black and Rogaway, 2002).
    Nothing of size n is made.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    x = position.astype(np.uint64)
    walking = np.ones(len(x), bool)
    while walking.any():
        left, right = np.divmod(x[walking], side)
        round_key = key[walking]
        for _ in range(6):
            round_key = _mix(round_key)
            left, right = right, (left + _mix(round_key ^ right) % side) % side
        x[walking] = left * side + right
        walking = x >= n
    return x.astype(np.int64)


# ---- reading meta.json as if a stranger had written it ---------------------------------------


def _read_meta(data_dir: Path, split: str) -> dict:
    """The checked meta.json. Only names that data.prepare gives are opened, inside the folder."""
    path = data_dir / "meta.json"
    if not path.is_file():
        raise DataError(f"{data_dir}: holds no prepared data; make it with: python -m data.prepare")
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); prepare again") from None

    def check(ok: bool, key: str) -> None:
        if not ok:
            raise DataError(f"{path}: {key} is missing or impossible; make it with data.prepare")

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0  # not isinstance: True is no count

    check(isinstance(meta, dict), "everything")
    check(meta.get("dtype") in ("uint16", "uint32"), "dtype")
    largest = 2**16 if meta["dtype"] == "uint16" else 2**32
    check(is_count(meta.get("vocab_size")) and 0 < meta["vocab_size"] <= largest, "vocab_size")
    end_of_text = meta.get("end_of_text")
    check(is_count(end_of_text) and end_of_text < meta["vocab_size"], "end_of_text")
    has_own = any((data_dir / f"tokenizer.{end}").is_file() for end in ("tiktoken", "json"))
    check(has_own or meta.get("tokenizer") in ("gpt2", "shipped"), "tokenizer")

    counts = meta.get(split)
    check(isinstance(counts, dict), split)
    for key in ("tokens", "bytes", "documents"):
        check(is_count(counts.get(key)), f"{split}.{key}")
    check(counts["tokens"] > 0 and counts["bytes"] > 0, f"{split}.tokens or .bytes")
    shards = counts.get("shards")
    check(isinstance(shards, list) and all(isinstance(s, dict) for s in shards), f"{split}.shards")
    for i, shard in enumerate(shards):
        check(shard.get("file") == f"{split}_{i:03d}.bin", f"{split}.shards[{i}].file")
        check(is_count(shard.get("tokens")), f"{split}.shards[{i}].tokens")
        sha256 = shard.get("sha256")
        check(isinstance(sha256, str) and len(sha256) == 64, f"{split}.shards[{i}].sha256")
    total = sum(shard["tokens"] for shard in shards)
    check(total == counts["tokens"], f"{split}.tokens (its shards hold {total:,})")
    return meta


def _check_files(data_dir: Path, shards: list[dict], itemsize: int) -> None:
    verify = sum(shard["tokens"] for shard in shards) * itemsize <= VERIFY_BYTES
    for shard in shards:
        path = data_dir / shard["file"]
        if not path.is_file():
            raise DataError(f"{path}: is missing, though meta.json names it; prepare again")
        expected, size = shard["tokens"] * itemsize, path.stat().st_size
        if size != expected:
            raise DataError(
                f"{path}: has {size:,} bytes where meta.json says {expected:,}; prepare again"
            )
        if verify and _sha256(path) != shard["sha256"]:
            raise DataError(f"{path}: was altered (its sha256 is not meta.json's); prepare again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
