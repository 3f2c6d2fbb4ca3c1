"""Around every test: one thread for torch, and what the test leaves running is ended. The deadline
is in pyproject.toml: pytest prints the stacks of a late test, and exits at once."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import pytest

# Toy models gain nothing from threads, and several processes that spin on two cores lose a lot
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes
if sys.platform == "linux":  # an orphan, such as a rank without torchrun, becomes our child
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def children() -> set[int]:
    """The processes that this one has started, and the orphans that those have left (Linux)."""
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= set(map(int, task.read_text().split()))
    return found


@pytest.fixture(autouse=True)
def no_process_left():
    others = children()
    yield
    while left := children() - others:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
