"""The token files of a folder in the making, and the record of what they hold so far."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import DataError


class Split:
    """Writes the shards of one split, after the tokens that `counts` has. What an earlier process
    wrote beyond them is removed, as it is not known to be whole."""

    def __init__(self, folder: Path, name: str, counts: dict, shard_tokens: int, itemsize: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        # bytes: of text, without the tokens that end documents. documents: that end in this split
        self.counts: dict[str, int] = counts  # tokens, bytes, documents
        sizes = {folder / file: tokens * itemsize for file, tokens in self._shards()}
        for path in folder.glob(f"{name}_*.bin"):
            if path not in sizes:
                path.unlink()
        for path, size in sizes.items():
            if path.stat().st_size < size:  # after a power failure
                raise DataError(f"{path}: was cut short; remove {folder.parent} to start anew")
            os.truncate(path, size)

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            shard, used = divmod(self.counts["tokens"], self.shard_tokens)
            part = tokens[: self.shard_tokens - used]
            with (self.folder / self._file(shard)).open("ab") as file:
                file.write(part)
            self.counts["tokens"] += len(part)
            tokens = tokens[len(part) :]

    def meta(self) -> dict:
        """What meta.json says. A memory map reads a shard that may be larger than memory."""
        shards = [{"file": file, "tokens": tokens} for file, tokens in self._shards()]
        for shard in shards:
            content = np.memmap(self.folder / shard["file"], mode="r")
            shard["sha256"] = hashlib.sha256(content).hexdigest()
        return self.counts | {"shards": shards}

    def _shards(self) -> Iterator[tuple[str, int]]:
        """Each file, and how many tokens it holds."""
        full, rest = divmod(self.counts["tokens"], self.shard_tokens)
        for i, tokens in enumerate([self.shard_tokens] * full + [rest] * (rest > 0)):
            yield self._file(i), tokens

    def _file(self, shard: int) -> str:
        return f"{self.name}_{shard:03d}.bin"


def fingerprints(settings: dict, inputs: list[Path]) -> list[str]:
    """The n-th stands for the settings and the first n inputs: their names, sizes and times."""
    digest = hashlib.sha256(repr(settings).encode())
    found = [digest.hexdigest()]
    for path in inputs:
        stat = path.stat()
        digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
        found.append(digest.hexdigest())
    return found


def read_state(file: Path, known: list[str]) -> dict:
    """What is written of the input files that are done. known: the fingerprints of today. Raises
    DataError if the files or the settings were others."""
    state = {"inputs": known[0], "items": 0, "skipped": 0}
    state |= {name: {"tokens": 0, "bytes": 0, "documents": 0} for name in ("train", "val")}
    if file.exists():
        state = json.loads(file.read_text())
    if state["inputs"] not in known:
        what = "was begun with other arguments, or an input file that was read has changed"
        raise DataError(f"{file.parent}: {what}; remove it to start anew")
    return state


def write_state(file: Path, state: dict) -> None:
    """A kill leaves the old record or the new one."""
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(state))
    os.replace(aside, file)
