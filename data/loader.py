"""Token files as training batches.

A batch is a pure function of (seed, step). So a resumed run needs no saved state of the
loader, and any number of ranks sees the same data.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data.command import UserError
from data.prepare import prepare_shipped
from data.tokenizer import digest_of_files

# The sha256 of a larger split is not checked, because that would take too long.
VERIFY_BYTES = 2**30

Batch = tuple[
    torch.Tensor, torch.Tensor
]  # inputs and next tokens, both int64 (rows, T)


class TokenDataset:
    """One split (`train` or `val`) of a folder that data.prepare made.

    The folder of the shipped corpus is made here if it does not exist yet. Only the
    windows that a batch needs are read, so a split may be far larger than memory.

    - `tokens` and `bytes`: how many tokens the split has, and how many bytes its text
    - `tokenizer`: a name or path for load_tokenizer
    - `tokenizer_digest`: what data.tokenizer.tokenizer_digest returns for it
    - `digest`: the sha256 of meta.json, which holds the sha256 of every other file
    - `windows_per_epoch`: how many windows of context_length + 1 tokens an epoch has

    The sizes of all files are checked here, and the sha256 of a split of up to
    VERIFY_BYTES. Token ids are checked when they are read. Raises UserError if a file
    is missing, damaged or of another version, or if every shard is too short for a
    window.
    """

    def __init__(self, data_dir: str | Path, split: str, context_length: int):
        self.data_dir = Path(data_dir)
        self.context_length = context_length
        prepare_shipped(self.data_dir)
        advice = "make it with: python -m data.prepare"
        if not self.data_dir.is_dir():
            raise UserError(f"{data_dir}: no such folder; {advice}")
        try:
            self._read_meta(split)
            self._verify_files()
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            problem = f"damaged, or of an older version ({reason})"
            raise UserError(f"{data_dir}: {problem}; {advice}") from None
        self._index_windows()
        if self.windows_per_epoch == 0:
            problem = f"its {split} split has {self.tokens:,} tokens, fewer than one"
            problem += f" window of context_length + 1 = {context_length + 1:,}"
            raise UserError(f"{data_dir}: {problem}; give more text")

    def _read_meta(self, split: str) -> None:
        """Sets what meta.json says about the split and its tokenizer."""
        content = (self.data_dir / "meta.json").read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        meta = json.loads(content)
        self.vocab_size = meta["vocab_size"]
        self._dtype = np.dtype(meta["dtype"]).newbyteorder("<")

        self.tokens = meta[split]["tokens"]
        self.bytes = meta[split]["bytes"]
        self._shards = meta[split]["shards"]
        self._paths = [self.data_dir / shard["file"] for shard in self._shards]
        sizes = [shard["tokens"] for shard in self._shards]
        self._sizes = np.array(sizes, dtype=np.int64)  # in tokens

        self._files = dict(meta["files"])  # name -> sha256
        of_tokenizer = dict(self._files)
        of_tokenizer.pop("token_bytes.bin", None)
        self.tokenizer_digest = digest_of_files(meta["tokenizer"], of_tokenizer)
        if "tokenizer.tiktoken" in of_tokenizer:
            self.tokenizer = str(self.data_dir / "tokenizer.tiktoken")
        elif "tokenizer.json" in of_tokenizer:
            self.tokenizer = str(self.data_dir)
        else:
            self.tokenizer = meta["tokenizer"]

    def _verify_files(self) -> None:
        """Raises OSError or ValueError if a file is not what meta.json says."""
        item_bytes = self._dtype.itemsize
        for path, tokens in zip(self._paths, self._sizes):
            if path.stat().st_size != tokens * item_bytes:
                raise ValueError(
                    f"{path.name} should have {tokens * item_bytes:,} bytes"
                )

        sha256 = dict(self._files)
        if self.tokens * item_bytes <= VERIFY_BYTES:
            for shard in self._shards:
                sha256[shard["file"]] = shard["sha256"]
        for name, expected in sha256.items():
            content = (self.data_dir / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise ValueError(f"{name} is not what meta.json says")

    def _index_windows(self) -> None:
        """Counts the windows of each shard.

        In a shard, windows follow each other every T tokens. Where the first one begins
        is drawn anew in each epoch. A shard counts one window fewer than would fit, so
        that its first window has T or more places to begin. So every token except the
        last T begins a window in one epoch or another.
        """
        T = self.context_length
        windows = np.maximum(1, (self._sizes - T) // T)
        windows[self._sizes <= T] = 0
        self.windows_per_epoch = int(windows.sum())
        # The number of a shard's first window, if all windows of an epoch are counted
        self._first_window = np.cumsum(windows) - windows
        # In how many places a shard's first window can begin
        self._places = (self._sizes - windows * T).astype(np.uint64)

    def batch(
        self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """Returns a rank's part of the batch of a step: inputs and next tokens.

        Both are int64 (batch_size / world_size, T). Steps count from 1. The parts of
        all ranks make up the same batch for every world_size. Each window comes once in
        an epoch, in an order that follows from (seed, epoch).
        """
        assert step >= 1
        assert batch_size % world_size == 0
        assert 0 <= rank < world_size
        rows = batch_size // world_size
        first_row = (step - 1) * batch_size + rank * rows
        row = np.arange(
            first_row, first_row + rows
        )  # counted from the start of the run
        epoch, position = np.divmod(row, self.windows_per_epoch)

        key = _mix(np.full(rows, seed % 2**64, np.uint64))
        key = _mix(key + epoch.astype(np.uint64))
        window = _shuffled(position, self.windows_per_epoch, key)
        shard = np.searchsorted(self._first_window, window, side="right") - 1

        shard_key = _mix(shard.astype(np.uint64) + np.uint64(1))
        place = _mix(key ^ shard_key) % self._places[shard]
        windows_before = window - self._first_window[shard]
        start = place.astype(np.int64) + windows_before * self.context_length

        windows = []
        for s, t in zip(shard.tolist(), start.tolist()):
            windows.append(self._read(s, t, self.context_length + 1))
        tokens = torch.from_numpy(np.stack(windows))  # (rows, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def in_order(self, batch_size: int, max_tokens: int = 2**63) -> Iterator[Batch]:
        """Yields the split from front to back, for evaluation: inputs and next tokens.

        Each token is a target exactly once, except the first of each shard. Batches are
        int64 (rows, T) with up to `batch_size` rows. The rest of a shard comes as
        (1, r) with r < T. `max_tokens` limits the number of targets: it is rounded down
        to whole windows, but there is at least one window.
        """
        T = self.context_length
        targets_left = max(max_tokens, T)
        for shard, size in enumerate(self._sizes.tolist()):
            start = 0
            while start < size - 1:
                targets_in_shard = size - 1 - start
                length = min(T, targets_in_shard)
                rows_in_shard = targets_in_shard // length
                rows = min(batch_size, rows_in_shard, targets_left // length)
                if rows == 0:
                    return
                targets = rows * length
                tokens = torch.from_numpy(self._read(shard, start, targets + 1))
                yield tokens[:-1].view(rows, length), tokens[1:].view(rows, length)
                start += targets
                targets_left -= targets

    def bytes_per_target(self, max_tokens: int) -> float:
        """Returns the mean bytes of text in a target of in_order(..., max_tokens)."""
        if max_tokens >= self.tokens:
            return self.bytes / self.tokens
        bytes_of_token = np.fromfile(self.data_dir / "token_bytes.bin", "<u2")
        bytes_of_targets = []
        for _, targets in self.in_order(1024, max_tokens):
            bytes_of_targets.append(bytes_of_token[targets.numpy()].ravel())
        return float(np.concatenate(bytes_of_targets).mean())

    def _read(self, shard: int, start: int, count: int) -> np.ndarray:
        """Returns int64 (count,): tokens of a shard from `start` on.

        np.fromfile is cheaper here than a memory map.
        """
        path = self._paths[shard]
        offset = start * self._dtype.itemsize
        tokens = np.fromfile(path, self._dtype, count, offset=offset)
        # With such a token id, a model would read past the end of its embedding.
        if len(tokens) < count or tokens.max() >= self.vocab_size:
            problem = "cut short, or holds a token id past the vocabulary"
            problem += f" of {self.vocab_size:,}"
            raise UserError(f"{path}: {problem}; prepare the data again")
        return tokens.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns a hash of each uint64: splitmix64 (Steele, Lea, Flood, 2014).

    Its sums and products overflow on purpose.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Returns int64: where a pseudo-random permutation of range(n) moves each position.

    The key, a uint64 for each position, chooses the permutation. A Feistel network
    permutes the points (left, right) of a square with side**2 >= n. A point that lands
    at n or beyond is permuted again until it lands below n (Black and Rogaway, 2002).
    This needs no memory of size n.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    point = position.astype(np.uint64)
    outside = np.ones(len(point), bool)
    while outside.any():
        left, right = np.divmod(point[outside], side)
        round_key = key[outside]
        for _ in range(6):
            round_key = _mix(round_key)
            shift = _mix(round_key ^ right) % side
            left, right = right, (left + shift) % side
        point[outside] = left * side + right
        outside = point >= n
    return point.astype(np.int64)
