"""Token files as training batches. A batch is a pure function of (seed, step). So a resumed run
needs no saved state of the loader, and any number of ranks sees the same data."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data.command import UserError
from data.prepare import prepare_shipped

VERIFY_BYTES = 2**30  # the sha256 of a split up to this size is checked: a second or two
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and next tokens, both int64 (rows, T)


class TokenDataset:
    """One split (`train` or `val`) of a folder that data.prepare made; the shipped corpus is made
    here on first use. Only the windows asked for are read, so it may be far larger than memory. The
    sizes of files are always checked, their sha256 up to VERIFY_BYTES, token ids when read. `bytes`
    are those of the text, `tokenizer` is what load_tokenizer takes, `tokenizer_digest` the sha256
    of its name and files, `digest` that of meta.json, which holds those of all other files. Raises
    UserError if a file is missing, damaged or of another version, or all shards are too short."""

    def __init__(self, data_dir: str | Path, split: str, context_length: int):
        self.data_dir = Path(data_dir)
        self.context_length = T = context_length
        prepare_shipped(self.data_dir)
        if not self.data_dir.is_dir():
            raise UserError(f"{data_dir}: no such folder; make it with: python -m data.prepare")
        try:
            content = (self.data_dir / "meta.json").read_bytes()
            self.digest = hashlib.sha256(content).hexdigest()
            meta = json.loads(content)
            counts, shards, files = meta[split], meta[split]["shards"], dict(meta["files"])
            self.tokens, self.bytes = counts["tokens"], counts["bytes"]
            self.vocab_size, self.tokenizer = meta["vocab_size"], meta["tokenizer"]
            named = repr((self.tokenizer, sorted(files.items()))).encode()
            self.tokenizer_digest = hashlib.sha256(named).hexdigest()
            self._dtype = np.dtype(meta["dtype"]).newbyteorder("<")
            self._paths = [self.data_dir / shard["file"] for shard in shards]
            self._sizes = np.array([shard["tokens"] for shard in shards], dtype=np.int64)
            if self.tokens * self._dtype.itemsize <= VERIFY_BYTES:
                files |= {shard["file"]: shard["sha256"] for shard in shards}
            for path, size in zip(self._paths, self._sizes * self._dtype.itemsize):
                if path.stat().st_size != size:
                    raise ValueError(f"{path.name} should have {size:,} bytes")
            for name, sha256 in files.items():
                if hashlib.sha256((self.data_dir / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{name} is not what meta.json says")
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = f"damaged, or of an older version ({type(error).__name__}: {error})"
            raise UserError(f"{data_dir}: {what}; make it with: python -m data.prepare") from None
        if "tokenizer.tiktoken" in files:
            self.tokenizer = str(self.data_dir / "tokenizer.tiktoken")
        elif "tokenizer.json" in files:
            self.tokenizer = str(self.data_dir)

        # An epoch draws where the first window of a shard begins, at o; the others follow, T tokens
        # apart. One window fewer than would fit lets o take T values or more, so that every token
        # but the last T begins a window in some epoch.
        windows = np.where(self._sizes > T, np.maximum(1, (self._sizes - T) // T), 0)
        self._offsets = (self._sizes - windows * T).astype(np.uint64)  # how many values o can take
        self._first = np.cumsum(windows) - windows  # each shard's first window in an epoch
        self.windows_per_epoch = int(windows.sum())
        if self.windows_per_epoch == 0:
            few = f"{self.tokens:,} tokens, fewer than one window of context_length + 1 = {T + 1:,}"
            raise UserError(f"{data_dir}: its {split} split has {few}; give more text")

    def check(self) -> None:
        """Raises UserError where the folder has been replaced: each read opens a file anew."""
        digest = hashlib.sha256((self.data_dir / "meta.json").read_bytes()).hexdigest()
        if digest != self.digest:
            raise UserError(f"{self.data_dir}: was replaced while it was read; put it back", 1)

    def batch(self, step: int, batch_size: int, seed: int, rank=0, world_size=1) -> Batch:
        """The rank-th of world_size parts of a batch, which is the same for every world_size. Steps
        count from 1. In an epoch each window comes once, in an order drawn from (seed, epoch)."""
        assert step >= 1 and batch_size % world_size == 0 and 0 <= rank < world_size
        rows = batch_size // world_size
        first = (step - 1) * batch_size + rank * rows
        epoch, position = np.divmod(np.arange(first, first + rows), self.windows_per_epoch)

        key = _mix(_mix(np.full(rows, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
        window = _shuffled(position, self.windows_per_epoch, key)
        shard = np.searchsorted(self._first, window, side="right") - 1
        # (seed, epoch, shard) draws the offset
        offset = _mix(key ^ _mix(shard.astype(np.uint64) + np.uint64(1))) % self._offsets[shard]
        start = offset.astype(np.int64) + (window - self._first[shard]) * self.context_length

        length = self.context_length + 1
        windows = [self._read(s, t, length) for s, t in zip(shard.tolist(), start.tolist())]
        tokens = torch.from_numpy(np.stack(windows))  # (rows, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def in_order(self, batch_size: int, max_tokens: int = 2**63) -> Iterator[Batch]:
        """The split from front to back, for evaluation: each token but a shard's first is a target
        exactly once. Batches of up to `batch_size` full windows, then the shard's rest as (1, r).
        `max_tokens` stops after so many targets, rounded down to whole windows but at least one."""
        self.check()
        T = self.context_length
        left = max(max_tokens, T)
        for shard, size in enumerate(self._sizes.tolist()):
            start = 0
            while start < size - 1:
                length = min(T, size - 1 - start)
                rows = min(batch_size, (size - 1 - start) // length, left // length)
                if rows == 0:
                    return
                tokens = torch.from_numpy(self._read(shard, start, rows * length + 1))
                yield tokens[:-1].view(rows, length), tokens[1:].view(rows, length)
                start, left = start + rows * length, left - rows * length

    def bytes_per_target(self, max_tokens: int) -> float:
        """How many bytes of text a target of in_order(..., max_tokens) stands for, on average."""
        if max_tokens >= self.tokens:
            return self.bytes / self.tokens
        lengths = np.fromfile(self.data_dir / "token_bytes.bin", "<u2")  # of each token
        targets = [lengths[y.numpy()].ravel() for _, y in self.in_order(1024, max_tokens)]
        return float(np.concatenate(targets).mean())

    def _read(self, shard: int, start: int, count: int) -> np.ndarray:
        """int64 (count,): tokens of a shard from `start` on. Cheaper than a memory map."""
        offset = start * self._dtype.itemsize
        tokens = np.fromfile(self._paths[shard], self._dtype, count, offset=offset)
        if len(tokens) < count or tokens.max() >= self.vocab_size:  # past the embedding
            what = f"cut short, or holds a token id past the vocabulary of {self.vocab_size:,}"
            raise UserError(f"{self._paths[shard]}: {what}; prepare the data again")
        return tokens.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood, 2014): well-mixed uint64. It overflows on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where `position` lands in a pseudo-random permutation of range(n), which its `key` chooses. A
    Feistel network permutes the side**2 >= n points (left, right) of a square. What lands at n or
    beyond is permuted again until it is inside (Black and Rogaway, 2002). No memory of size n."""
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
