"""Fixtures. Every test has one thread, and finds signals as a command does."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

# Toy models gain nothing from threads, and processes that spin on two cores lose a lot.
# Set before torch is imported, here and in child processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # a slow machine shows bars where a fast one does not

from helpers import ROOT, TOY, run, run_code, train  # noqa: E402

from data.prepare import prepare  # noqa: E402

# gc.collect() after each run then looks only at what is new: 0.3 seconds less
gc.freeze()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A folder with the files that commands name. ROOT may be read-only."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "studies"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def as_a_command_finds_it(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def refused(capsys):
    """Asserts that a command ends with code 2 and one line that has this word."""

    def refused(word: object, *arguments, main=None) -> None:
        capsys.readouterr()
        texts = [str(argument) for argument in arguments]
        code = main(texts) if main else train(*texts)
        error = capsys.readouterr().err
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(word) in error, error

    return refused


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Runs code in a process for each environment. Returns exit codes and errors."""
    errors = tmp_path_factory.mktemp("processes") / "stderr"
    linux = sys.platform == "linux"  # a fork after such imports may abort on macOS
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    if linux:  # torch takes seconds
        modules = ["helpers", "configs", "model", "data.loader", "torch._dynamo"]
        context.set_forkserver_preload(modules)

    def run_processes(
        code: str, *arguments, environments=({},)
    ) -> tuple[list[int], str]:
        errors.write_text("")
        texts = [str(argument) for argument in arguments]
        started = []
        for environment in environments:
            process = context.Process(
                target=run_code, args=(code, texts, environment, errors)
            )
            process.start()
            started.append(process)
        for process in started:
            process.join()
        return [process.exitcode for process in started], errors.read_text()

    return run_processes


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A config file with its data: sentences that a small model can learn."""
    folder = tmp_path_factory.mktemp("toy")
    lines = []
    for a in range(20):
        for b in range(20):
            text = f"The sum of {a} and {b} is {a + b}. " * 3
            lines.append(json.dumps({"text": text}) + "\n")
    source = folder / "text.jsonl"
    source.write_text("".join(lines))
    prepare([source], "shipped", folder / "data")
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
