"""How an error becomes one line for a person, and an exit code."""

import os
import sys

import torch
import torch.distributed as dist

from data import DataError
from run.config import Config, micro_batch

# What torch says where it has no class for it: on a CPU of any system; on MPS, two texts
NO_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory", "Invalid buffer size")


def out_of_memory(error: Exception) -> bool:
    said = any(text in str(error) for text in NO_MEMORY)
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def print_error(error: Exception, c: Config | None) -> int:
    """Print an error in one line, and return the exit code. A bug is raised again. c: None while
    the config is read, when all ranks of a machine have the same error; then one of them speaks."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    line, code = " ".join(str(error).split()), 1
    if isinstance(error, DataError):
        code = error.code
    elif c and out_of_memory(error):
        now = micro_batch(c, ranks)
        smaller = [n for n in range(1, now // 2 + 1) if now % n == 0]
        way = f"--micro_batch_size={smaller[-1]}" if smaller else "a shorter --context_length"
        line = f"out of memory with micro batches of {now} sequences; try {way}"
    elif ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in line):  # it has no class
        line = f"another rank no longer answers; --resume goes on from the last checkpoint ({line})"
    elif not isinstance(error, OSError):
        raise error
    if c or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr)
    return code
