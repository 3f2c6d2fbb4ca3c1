"""Prune SmolLM2-135M in several ways and write a table: python -m tools.smollm2_table

Every cell is a run of configs/smollm2.py in out/smollm2/. Its log is kept in results/smollm2/, and
a cell whose log is there is not run again. results/smollm2/table.md is written after each cell.
"""

import itertools
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import read_log
from config import load_config
from llama import read_shape
from model import GPT, GPTConfig
from prune import CRITERIA

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "smollm2"
WIDTHS = (768, 1152)
WAYS = {"oneshot": "at once", "cubic": "step by step"}
HEAD = """| d_ff | how | criterion | parameters | before | pruned | recovered |
| --- | --- | --- | --- | --- | --- | --- |
"""


def cells() -> list[tuple[str, int, str]]:
    """(schedule, width, criterion), the most telling first."""
    return list(itertools.product(WAYS, WIDTHS, CRITERIA))


def folder(cell: tuple[str, int, str]) -> Path:
    return RESULTS / "-".join(map(str, cell))


def run(cell: tuple[str, int, str]) -> None:
    schedule, width, criterion = cell
    out = ROOT / "out" / "smollm2" / folder(cell).name
    knobs = [f"--prune_schedule={schedule}", f"--d_ff_target={width}", f"--criterion={criterion}"]
    command = [sys.executable, "train.py", "configs/smollm2.py", f"--out_dir={out}", "--overwrite"]
    subprocess.run(command + knobs, cwd=ROOT, check=True)
    folder(cell).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "log.jsonl", folder(cell) / "log.jsonl")
    shutil.rmtree(out)  # 1.3 GB or more


def row(cell: tuple[str, int, str]) -> str:
    """Perplexities on the same tokens: before the first prune, after the last, at the end. Step by
    step, the model recovers between the prunes too."""
    events = read_log(folder(cell))
    prunes = [e for e in events if e["event"] == "prune"]
    losses = prunes[0]["loss_before"], prunes[-1]["loss_after"], events[-1]["val_loss"]
    ppl = " | ".join(f"{math.exp(loss):.1f}" for loss in losses)
    return f"| {cell[1]} | {WAYS[cell[0]]} | {cell[2]} | {events[-1]['params']:,} | {ppl} |\n"


@torch.no_grad()
def tokens_per_second(shapes: list[GPTConfig], repeats: int = 3) -> list[float]:
    """Of forward passes over 8 x 128 tokens in bfloat16, per second of CPU time, so that other work
    on the machine does not count. The best of some rounds in turn."""
    models = [GPT(replace(shape, context_length=128)).eval() for shape in shapes]
    x = torch.zeros(8, 128, dtype=torch.long)
    best = [math.inf] * len(models)
    for _, (i, model) in itertools.product(range(repeats), enumerate(models)):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        best[i] = min(best[i], time.process_time() - began)
    return [x.numel() / seconds for seconds in best]


def write_table(speeds: str) -> None:
    done = [cell for cell in cells() if (folder(cell) / "log.jsonl").exists()]
    (RESULTS / "table.md").write_text(HEAD + "".join(row(cell) for cell in done) + "\n" + speeds)


def main() -> int:
    RESULTS.mkdir(parents=True, exist_ok=True)
    shape = read_shape(ROOT / load_config(str(ROOT / "configs" / "smollm2.py")).init_from)
    shapes = [replace(shape, d_ff=[width] * shape.n_layer) for width in (shape.d_ff[0], *WIDTHS)]
    speeds = "| d_ff | parameters | tokens per CPU second, forward |\n| --- | --- | --- |\n"
    for s, speed in zip(shapes, tokens_per_second(shapes)):
        speeds += f"| {s.d_ff[0]} | {s.n_parameters():,} | {speed:.0f} |\n"
    write_table(speeds)
    for cell in cells():
        if not (folder(cell) / "log.jsonl").exists():
            run(cell)
            write_table(speeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
