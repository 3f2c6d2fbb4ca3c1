"""Around every test: one thread for torch, a deadline, and no process left behind."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

# Toy models gain nothing from threads, and several processes that spin on two cores lose a lot
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes

# Seconds from the start of a test, its fixtures' setup included, to the end of their teardown. No
# test fails by another clock: where they wait, they wait for an event. On two cores, beside other
# work, the longest takes 45 s, of those marked slow three minutes
DEADLINE, DEADLINE_OF_SLOW = 600, 3600
GRACE = 20  # for a test that was told to end


def descendants() -> list[int]:
    """The living children of this process, theirs and so on, parents first (Linux)."""
    parent_of, found = {}, [os.getpid()]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parent_of[int(stat.parent.name)] = int(parent)
    for pid in found:
        found += [child for child, parent in parent_of.items() if parent == pid]
    return found[1:]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def pytest_configure(config) -> None:
    config.stash[LATE] = []
    config.stash[STDERR] = os.fdopen(os.dup(2), "w")  # pytest takes 2 away while a test runs
    if sys.platform == "linux":  # an orphan, such as a rank without torchrun, becomes our child
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def pytest_unconfigure(config) -> None:
    if config.stash[LATE]:  # Python waits for its threads before it ends: one may be left, and hang
        faulthandler.dump_traceback_later(GRACE, exit=True, file=config.stash[STDERR])


STDERR, LATE, INSIDE = pytest.StashKey(), pytest.StashKey(), pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def inside(item):
    """Setup, call and teardown: what a deadline ends. What pytest does between them, it may do."""
    item.stash[INSIDE] = True
    try:
        return (yield)
    finally:
        item.stash[INSIDE] = False


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = inside


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that is late loses its child processes, and fails where its main thread stands. Where
    that does not come back from C, all stacks are printed, and pytest ends.
    """
    seconds = DEADLINE_OF_SLOW if item.get_closest_marker("slow") else DEADLINE
    main, over, stderr = threading.get_ident(), threading.Event(), item.config.stash[STDERR]
    words = f"{item.nodeid}: not over after {seconds} s"

    def watch() -> None:
        patience = seconds
        while not over.wait(patience):  # again where something caught the first one
            print(f"\n{words}; killing what it has started", file=stderr, flush=True)
            item.config.stash[LATE].append(item)
            kill(descendants())
            signal.pthread_kill(main, signal.SIGALRM)
            patience = GRACE

    def fail(*_) -> None:
        if item.stash[INSIDE]:
            pytest.fail(words)

    item.stash[INSIDE] = False
    others, before = set(descendants()), signal.signal(signal.SIGALRM, fail)
    faulthandler.dump_traceback_later(seconds + 10 * GRACE, exit=True, file=stderr)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return (yield)
    finally:
        over.set()
        watcher.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        kill([pid for pid in descendants() if pid not in others])
