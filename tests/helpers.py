"""What several files of tests use. Their fixtures are in conftest.py."""

import gc
import json
import os
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from data.command import describe_error

ROOT = Path(__file__).parent.parent
# Prunes all kinds between steps 15 and 25: d_ff four times, layers at steps 17 and 25
TOY = {
    "max_steps": 30,
    "batch_size": 8,
    "context_length": 16,
    "warmup_steps": 3,
    "n_layer": 4,
    "d_model": 16,
    "n_head": 4,
    "n_kv_head": 4,
    "d_ff": 32,
    "d_ff_target": 8,
    "n_kv_head_target": 1,
    "d_model_target": 8,
    "n_layer_target": 2,
    "round_to": 4,
    "prune_start": 0.4,
    "prune_end": 0.8,
    "prune_every": 2,
    "log_every": 1,
    "eval_every": 10,
    "save_every": 5,
    "eval_tokens": 500,
    "device": "cpu",
    "dtype": "float32",
    "compile": "off",
    "optimizer": "adamw",
}


@contextmanager
def same_process_state():
    """Put back what a script changes in its process: arguments, signals, error hook."""
    argv = sys.argv
    excepthook = sys.excepthook
    handlers = {}
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK"):
        if hasattr(signal, name):
            number = getattr(signal, name)
            handlers[number] = signal.getsignal(number)
    try:
        yield
    finally:
        sys.argv = argv
        sys.excepthook = excepthook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(*arguments: object) -> int:
    """Run train.py in this process. Returns its exit code; an error goes to stderr."""
    code = 0
    with same_process_state():
        sys.argv = ["train.py", *map(str, arguments)]
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except (Exception, KeyboardInterrupt) as error:
            described = describe_error(error)
            if described is None:
                raise
            line, code = described
            print(line, file=sys.stderr)
    gc.collect()  # the run's lock goes with its globals
    return code


def run(config: Path, out: Path, *arguments: str) -> int:
    """Train a config in a folder of its own. Returns the exit code."""
    return train(config, f"--out_dir={out}", *arguments)


def run_code(code: str, arguments: list[str], environment: dict, errors: Path) -> None:
    """Run code in this new process, with its errors in a file, and no other output."""
    os.environ.update(environment)
    sys.argv[1:] = arguments
    for stream, file in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    exec(code, {"os": os, "sys": sys, "train": train})


def events(out: Path, name: str) -> list[dict]:
    """The events of this name in a run's log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def same_end(a: Path, b: Path) -> bool:
    """Whether two runs left the same bytes."""
    return (a / "checkpoint.pt").read_bytes() == (b / "checkpoint.pt").read_bytes()
