"""Does an entry beat the small model? python -m tools.challenge FOLDER [ARM]

The rules: docs/challenge.md. FOLDER holds the runs.csv of tools.compare. The entry is its arm ARM
("entry"), the small model its arm "scratch_flops". Prints YES, or NO and why; the exit code is 0
or 1.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import mean

from tools import command
from tools.results import arms_of, paired, read_csv, t_test

SMALL, SEEDS = "scratch_flops", [1, 2, 3, 4, 5]
# Final parameters -> FLOPs, of configs/lab/scratch_flops.py and of configs/scratch_flops.py
BUDGETS = {57_504: 3_914_694_918_144, 250_432: 8_882_730_565_632}
ROUNDING = 0.002  # of the FLOPs: tools.compare lets a step and a half of 1000 differ
LEVEL = 0.01


def verdict(rows: list[dict], entry: str = "entry") -> tuple[bool, str]:
    """Whether the arm `entry` of a runs.csv wins, and the first reason why not, or the numbers."""
    arms = arms_of(rows)
    if len(rows) > sum(map(len, arms.values())):
        return False, "a seed of an arm stands there twice"
    if not all(math.isfinite(x) for row in rows for x in (row["val_loss"], row["flops"])):
        return False, "a loss or its FLOPs are no number"
    for arm in (entry, SMALL):
        seeds = sorted(arms.get(arm, ()))
        if seeds != SEEDS:
            return False, f"{arm} has the seeds {seeds}, not {SEEDS}"
    ours, theirs = arms[entry], arms[SMALL]
    sizes = {row["params"] for row in (*ours.values(), *theirs.values())}
    if len(sizes) > 1 or not sizes <= BUDGETS.keys():
        found, wanted = ([f"{n:,}" for n in sorted(numbers)] for numbers in (sizes, BUDGETS))
        what = f"the runs end with {' and '.join(found)} parameters"
        return False, f"another final shape: {what}, not all with {' or '.join(wanted)}"
    budget = BUDGETS[sizes.pop()]
    excess = max(row["flops"] for row in ours.values()) / budget - 1
    if excess > ROUNDING:
        return False, f"{entry} spends {excess:.1%} more than the {budget:.4g} FLOPs allowed"
    saved = 1 - min(row["flops"] for row in theirs.values()) / budget
    if saved > ROUNDING:
        return False, f"{SMALL} spends {saved:.1%} less than the {budget:.4g} FLOPs it should"
    behind = paired(ours, theirs)
    lead, p = -mean(behind), t_test(behind)
    numbers = f"lead {lead:+.4f} nats per token, p = {p:.2g}"
    if lead <= 0:
        return False, f"its mean loss is not lower: {numbers}"
    return (True, numbers) if p < LEVEL else (False, f"p is not below {LEVEL}: {numbers}")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("arm", nargs="?", default="entry", metavar="ARM")
    args = parser.parse_args(argv)
    wins, why = verdict(read_csv(args.folder / "runs.csv"), args.arm)
    print(f"{'YES' if wins else 'NO'}: {why}")
    return 0 if wins else 1


if __name__ == "__main__":
    sys.exit(main())
