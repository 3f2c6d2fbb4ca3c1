"""Does an entry beat the small model? python -m tools.challenge FOLDER [ARM]

The rules: docs/challenge.md. FOLDER holds the runs.csv of tools.compare. The entry is its arm ARM
("entry"), the small model its arm "scratch_flops". The exit code is 0 for YES, 1 for NO.
"""

import argparse
import sys
from statistics import mean

from tools import command, expanded
from tools.results import Arms, paired, read_csv, t_test

SMALL, SEEDS = "scratch_flops", [1, 2, 3, 4, 5]
# Final parameters -> FLOPs, of configs/lab/scratch_flops.py and of configs/scratch_flops.py
BUDGETS = {57_504: 3_914_694_918_144, 250_432: 8_882_730_565_632}
ROUNDING = 0.002  # of the FLOPs: tools.compare lets a step and a half of 1000 differ
LEVEL = 0.01


def verdict(arms: Arms, entry: str = "entry") -> tuple[bool, str]:
    """Whether the arm `entry` wins, and the first reason why not, or the numbers."""
    for arm in (entry, SMALL):
        if (seeds := sorted(arms.get(arm, ()))) != SEEDS:
            return False, f"{arm} has the seeds {seeds}, not {SEEDS}"
    ours, theirs = (arms[arm].values() for arm in (entry, SMALL))
    sizes = {row["params"] for row in (*ours, *theirs)}
    budget = BUDGETS.get(min(sizes))
    if len(sizes) > 1 or not budget:
        return False, f"final parameters are {sorted(sizes)}, not all one of {sorted(BUDGETS)}"
    spent, given = max(r["flops"] for r in ours) / budget, min(r["flops"] for r in theirs) / budget
    if spent > 1 + ROUNDING or given < 1 - ROUNDING:
        return False, f"{entry} spends {spent:.1%} of {budget:.4g} FLOPs, {SMALL} {given:.1%}"
    behind = paired(arms[entry], arms[SMALL])
    lead, p = -mean(behind), t_test(behind)
    numbers = f"lead {lead:+.4f} nats per token, p = {p:.2g}"
    if lead <= 0 or p >= LEVEL:
        return False, f"its mean loss is not lower, with p below {LEVEL}: {numbers}"
    return True, numbers


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=expanded, metavar="FOLDER")
    parser.add_argument("arm", nargs="?", default="entry", metavar="ARM")
    args = parser.parse_args(argv)
    wins, why = verdict(read_csv(args.folder / "runs.csv"), args.arm)
    print(f"{'YES' if wins else 'NO'}: {why}")
    return 0 if wins else 1


if __name__ == "__main__":
    sys.exit(main())
