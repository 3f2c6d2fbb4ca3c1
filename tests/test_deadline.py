"""A test that hangs ends pytest and is named. What a test has started ends with it."""

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import os, subprocess, sys

ours, theirs = os.pipe()  # what descends from this process holds an end of it
os.set_inheritable(theirs, True)

def test_leaves_an_orphan():
    sleep = [sys.executable, "-c", "import time; time.sleep(10**6)"]
    start = f"import subprocess; subprocess.Popen({sleep}, close_fds=False)"
    subprocess.run([sys.executable, "-c", start], close_fds=False, start_new_session=True)

def test_finds_none_left():
    os.close(theirs)
    assert os.read(ours, 1) == b""  # nobody else holds the other end

def test_hangs():
    os.read(os.pipe()[0], 1)
"""


def test_what_hangs_ends_pytest_and_is_named_and_what_a_test_left_is_ended(tmp_path):
    tests = Path(__file__).parent
    shutil.copy(tests / "conftest.py", tmp_path)
    (tmp_path / "test_these.py").write_text(TESTS)
    settings = ["-c", tests.parent / "pyproject.toml", "-o", "faulthandler_timeout=3"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *settings]
    result = subprocess.run([*command, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.count("PASSED") == 2 and "FAILED" not in result.stdout
    assert "in test_hangs" in result.stderr and result.returncode == 1
