"""Around every test: one thread for torch, a deadline, and no process left behind."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

import pytest

# Toy models gain nothing from threads, and several processes that spin on two cores lose a lot
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes

# Seconds from the start of a test, its fixtures' setup included, to the end of their teardown. No
# test fails by another clock: where they wait, they wait for an event. On two cores, beside other
# work, the longest takes 45 s, of those marked slow three minutes
DEADLINE, DEADLINE_OF_SLOW = 600, 3600
GRACE = 20  # for a test that was told to end
STDERR, LATE = pytest.StashKey(), pytest.StashKey()


def children() -> set[int]:
    """The processes that this one has started, and the orphans that those have left (Linux)."""
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= set(map(int, task.read_text().split()))
    return found


def pytest_configure(config) -> None:
    config.stash[STDERR] = os.dup(2)  # pytest takes 2 away while a test runs
    if sys.platform == "linux":  # an orphan, such as a rank without torchrun, becomes our child
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def pytest_unconfigure(config) -> None:
    if config.stash.get(LATE, False):  # it may have left a thread, and Python would wait for that
        config.get_terminal_writer().flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that is late fails where its main thread stands. Where that does not come back from C,
    all stacks are printed, and pytest ends.
    """
    seconds = DEADLINE_OF_SLOW if item.get_closest_marker("slow") else DEADLINE

    def fail(*_) -> None:
        item.config.stash[LATE] = True
        pytest.fail(f"{item.nodeid}: not over after {seconds} s")

    others, before = children(), signal.signal(signal.SIGALRM, fail)
    too_late, stderr = seconds + 3 * GRACE, item.config.stash[STDERR]
    faulthandler.dump_traceback_later(too_late, exit=True, file=stderr)
    signal.setitimer(signal.ITIMER_REAL, seconds, GRACE)  # again where something caught the first
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        while left := children() - others:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
