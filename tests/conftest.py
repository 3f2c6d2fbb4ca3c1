"""Around every test: one thread for torch, and what the test leaves running is ended. The deadline
is in pyproject.toml: pytest prints the stacks of a late test, and exits at once."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Toy models gain nothing from threads, and several processes that spin on two cores lose a lot
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes

from helpers import ROOT, TOY, run  # noqa: E402

from data.prepare import prepare  # noqa: E402

if os.name == "posix":  # on Linux, an orphan, such as a rank without torchrun, becomes our child
    with contextlib.suppress(AttributeError):
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends pytest, not a run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a command finds it
    while left := children() - others:
        for pid in left:
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


# Runs code in new processes, for each line of its input. They are forks of one that has imported
# torch: that takes seconds
FORKS = """
import json, os, sys
import torch._dynamo  # the first optimizer would import it
import train
for line in sys.stdin:
    code, arguments, environments, output = json.loads(line)
    pids = []
    for environment in environments:
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(environment)
            sys.argv[1:] = arguments
            for stream, file in zip((1, 2), output):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
            exec(code)
            sys.exit()
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
"""


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """Runs Python code, with arguments, in processes of their own that have imported train, one for
    each dict of variables. Returns their exit codes, their output and their errors."""
    files = [tmp_path_factory.mktemp("together") / name for name in ("stdout", "stderr")]
    to_forks = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    forks = hasattr(os, "fork") and subprocess.Popen([sys.executable, "-c", FORKS], **to_forks)

    def in_forks(code: str, arguments: list[str], environments: list[dict]) -> list[int]:
        job = [code, arguments, environments, list(map(str, files))]
        print(json.dumps(job), file=forks.stdin, flush=True)
        return json.loads(forks.stdout.readline())

    def in_new(code: str, arguments: list[str], environments: list[dict]) -> list[int]:
        command = [sys.executable, "-c", "import os, sys, train\n" + code, *arguments]
        with open(files[0], "a") as out, open(files[1], "a") as err:
            to_files = {"stdout": out, "stderr": err, "cwd": ROOT}
            new = [subprocess.Popen(command, env=os.environ | e, **to_files) for e in environments]
            return [process.wait() for process in new]

    def run_code(code: str, *arguments, environments: list[dict]) -> tuple[list[int], str, str]:
        for file in files:
            file.write_text("")
        codes = (in_forks if forks else in_new)(code, list(map(str, arguments)), environments)
        return codes, *(file.read_text() for file in files)

    yield run_code
    if forks:
        forks.communicate()


@pytest.fixture(scope="session")
def forked(together):
    """The same for one process."""

    def run_code(code: str, *arguments) -> tuple[int, str, str]:
        (ended,), output, error = together(code, *arguments, environments=[{}])
        return ended, output, error

    return run_code


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A config file with its data: sentences that a small model can learn."""
    folder = tmp_path_factory.mktemp("toy")
    texts = [f"The sum of {a} and {b} is {a + b}. " * 3 for a in range(20) for b in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    prepare([folder / "text.jsonl"], "shipped", folder / "data")
    knobs = TOY | {"data_dir": str(folder / "data")}
    config = folder / "toy.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in knobs.items()))
    return config


@pytest.fixture(scope="session")
def undisturbed(toy, tmp_path_factory) -> Path:
    """The out_dir of the toy's run from start to end, to read only."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(toy, out) == 0
    return out
