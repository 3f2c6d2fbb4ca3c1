"""What several files of tests use; their fixtures are in conftest.py."""

import json
import os
import sys
from pathlib import Path

import train

ROOT = Path(__file__).parent.parent
# Prunes all kinds between steps 15 and 25: d_ff four times, layers at steps 17 and 25
TOY = {
    "max_steps": 30, "batch_size": 8, "context_length": 16, "warmup_steps": 3,
    "n_layer": 4, "d_model": 16, "n_head": 4, "n_kv_head": 4, "d_ff": 32,
    "d_ff_target": 8, "n_kv_head_target": 1, "d_model_target": 8, "n_layer_target": 2,
    "round_to": 4, "prune_start": 0.4, "prune_end": 0.8, "prune_every": 2,
    "log_every": 1, "eval_every": 10, "save_every": 5, "eval_tokens": 500,
    "device": "cpu", "dtype": "float32", "compile": "off", "optimizer": "adamw",
}  # fmt: skip


def run(config: Path, out: Path, *arguments: str) -> int:
    return train.main([str(config), f"--out_dir={out}", *arguments])


def run_here(code: str, arguments: list[str], environment: dict, errors: Path) -> None:
    """Run code in this new process, with its errors in a file, and no other output."""
    os.environ.update(environment)
    sys.argv[1:] = arguments
    for stream, file in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    exec(code, {"os": os, "sys": sys, "train": train})


def events(out: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def same_end(a: Path, b: Path) -> bool:
    return (a / "checkpoint.pt").read_bytes() == (b / "checkpoint.pt").read_bytes()
