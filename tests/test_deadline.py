"""The deadline of every test (conftest.py): what hangs fails by its name and leaves no process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HANGS = '''
import contextlib, ctypes, os, subprocess, sys, threading, time
import conftest, pytest
conftest.DEADLINE, conftest.GRACE = 0.5, float(os.environ["GRACE"])

# What descends from this process holds an end of a pipe
ours, theirs = os.pipe()
os.set_inheritable(theirs, True)

def start(code):
    """A process with a child that sleeps."""
    sleep = [sys.executable, "-c", "import time; time.sleep(10**6)"]
    code = f"import subprocess; child = subprocess.Popen({sleep}, close_fds=False); {code}"
    return subprocess.Popen([sys.executable, "-c", code], close_fds=False, start_new_session=True)

@pytest.fixture
def stuck_at_its_end():
    yield
    time.sleep(10**6)

def test_catches_the_first():
    with contextlib.suppress(BaseException):
        time.sleep(10**6)
    time.sleep(10**6)

def test_waits_for_a_child_of_a_child():
    with start("child.wait()") as child:
        child.wait()

def test_has_a_stuck_thread():
    threading.Thread(target=time.sleep, args=(10**6,)).start()
    time.sleep(10**6)

def test_has_a_fixture_stuck_at_its_end(stuck_at_its_end):
    pass

@pytest.mark.slow
def test_leaves_an_orphan():
    start("").wait()

@pytest.mark.slow
def test_may_take_longer_and_finds_that_none_is_left():
    time.sleep(2 * conftest.DEADLINE)
    os.close(theirs)
    assert os.read(ours, 1) == b""  # nobody else holds the other end

def test_is_stuck_in_c():
    lock = bytes(64)  # a mutex that nobody will ever open
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(lock)
'''


def hang(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """These tests in a pytest of their own, which has ended."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir=."]
    environment = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, env=environment
    )


def test_what_hangs_fails_by_its_name_and_leaves_no_process_and_the_others_run(tmp_path):
    result = hang(tmp_path, "-k", "not stuck_in_c", GRACE="2")
    for name, how in (
        ("catches_the_first", "FAILED"), ("waits_for_a_child_of_a_child", "FAILED"),
        ("has_a_stuck_thread", "FAILED"), ("has_a_fixture_stuck_at_its_end", "ERROR"),
    ):  # fmt: skip
        where = f"test_hangs.py::test_{name}"
        assert f"{how} {where} - Failed: {where}: not over after 0.5 s" in result.stdout
    assert "PASSED test_hangs.py::test_may_take_longer_and_finds_that_none_is_left" in result.stdout
    assert result.returncode == 1


def test_what_does_not_come_back_from_c_ends_pytest_and_is_named(tmp_path):
    result = hang(tmp_path, "-k", "stuck_in_c", GRACE="0.3")
    assert result.returncode == 1 and "in test_is_stuck_in_c" in result.stderr
