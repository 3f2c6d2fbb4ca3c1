"""The deadline of every test (conftest.py): what hangs fails by its name and leaves no process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
import ctypes, os, subprocess, sys, threading, time
import conftest, pytest
conftest.DEADLINE, conftest.GRACE = 0.5, float(os.environ.get("GRACE", 4))

def start(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], close_fds=False, **options)

@pytest.fixture(scope="module")
def stuck():
    time.sleep(10**6)

@pytest.fixture
def stuck_at_its_end():
    yield
    time.sleep(10**6)

def test_sleeps():
    time.sleep(10**6)

def test_catches_what_it_can():
    while True:
        try:
            time.sleep(10**6)
        except BaseException as error:
            if "caught" in sys.argv:
                raise
            sys.argv.append("caught")

def test_waits_for_a_child_of_a_child():
    code = "import subprocess, sys; "
    code += "subprocess.run([sys.executable, '-c', 'input()'], close_fds=False)"
    with start(code, stdin=subprocess.PIPE, start_new_session=True) as child:
        child.wait()

def test_has_a_stuck_thread():
    threading.Thread(target=time.sleep, args=(10**6,)).start()
    time.sleep(10**6)

def test_has_a_stuck_fixture(stuck):
    pass

def test_has_another(stuck_at_its_end):
    pass

@pytest.mark.slow
def test_may_take_longer():
    pass

def test_is_stuck_in_c():
    if "gil" not in os.environ:
        start("import time; time.sleep(10**6)", start_new_session=True)
    lock = bytes(64)  # a mutex that nobody will ever open
    lib = (ctypes.PyDLL if "gil" in os.environ else ctypes.CDLL)(None)
    for _ in range(2):
        lib.pthread_mutex_lock(lock)

@pytest.mark.slow
def test_leaves_an_orphan():
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
    code += "time.sleep(10**6)'], close_fds=False, start_new_session=True)"
    assert start(code).wait() == 0
"""


def hang(tmp_path: Path, *names: str, **environment) -> subprocess.CompletedProcess:
    """These tests in a pytest of their own. Returns when it and all that it started have ended."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_hangs.py").write_text(HANGS)
    alive, held = os.pipe()  # `held` is held by every process that descends from it
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir=."]
    environment = os.environ | {"COLUMNS": "200"} | environment
    result = subprocess.run(
        [*command, *(f"test_hangs.py::{name}" for name in names)],
        cwd=tmp_path, capture_output=True, text=True, pass_fds=[held], env=environment,
    )  # fmt: skip
    os.close(held)
    assert os.read(alive, 1) == b""
    os.close(alive)
    return result


def test_what_hangs_fails_by_its_name_and_the_others_run(tmp_path):
    late = ["test_sleeps", "test_catches_what_it_can", "test_waits_for_a_child_of_a_child"]
    result = hang(tmp_path, *late, "test_has_a_stuck_fixture", "test_may_take_longer")
    for name in late:
        assert f"FAILED test_hangs.py::{name} - Failed: test_hangs.py::{name}" in result.stdout
        assert f"test_hangs.py::{name}: not over after 0.5 s" in result.stderr
    assert "ERROR test_hangs.py::test_has_a_stuck_fixture - Failed: test_hangs" in result.stdout
    assert "PASSED test_hangs.py::test_may_take_longer" in result.stdout
    assert result.returncode == 1


def test_a_fixture_that_hangs_at_its_end_is_an_error_of_its_test(tmp_path):
    result = hang(tmp_path, "test_has_another")
    assert "ERROR test_hangs.py::test_has_another - Failed: test_hangs" in result.stdout
    assert result.returncode == 1


def test_a_thread_that_is_left_does_not_keep_pytest_from_ending(tmp_path):
    result = hang(tmp_path, "test_has_a_stuck_thread")
    assert "FAILED test_hangs.py::test_has_a_stuck_thread - Failed" in result.stdout
    assert result.returncode == 1


@pytest.mark.parametrize("gil", [{}, {"gil": "held"}], ids=["free", "held"])
def test_what_does_not_come_back_from_c_ends_pytest_and_is_named(gil, tmp_path):
    result = hang(tmp_path, "test_is_stuck_in_c", GRACE="0.3", **gil)
    assert result.returncode == 1 and "test_is_stuck_in_c" in result.stderr


def test_a_process_that_a_test_leaves_ends_with_it(tmp_path):
    result = hang(tmp_path, "test_leaves_an_orphan")
    assert result.returncode == 0, result.stdout
