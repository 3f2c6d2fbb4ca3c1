"""Table of a comparison, from its runs.csv: python -m tools.results FOLDER [REFERENCE]

runs.csv has a row a run. table.md comes out of it byte for byte.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from statistics import mean, stdev

from mpmath import betainc  # torch installs it

from run import UserError
from run.files import write_text
from tools import command, expanded

# prune_cost: the rise of the loss on the same batches, summed over the run's prunes
RUN_COLUMNS = ["arm", "seed", "val_loss", "val_bpb", "params", "tokens", "flops", "seconds"]
RUN_COLUMNS += ["prune_cost"]
ANY_SIGN = {"seed", "seconds", "prune_cost"}  # all other numbers are above 0
FIRST_CELLS = "| arm | seeds | loss, nats/token | bits/byte |"


def read_csv(path: Path) -> list[dict]:
    """The rows of a runs.csv. All but the arm's name are numbers: int where written as one. Raises
    UserError for other columns, for what is no such number, and for a run that comes twice.
    """
    rows: list[dict] = []
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        try:
            if next(lines, None) != RUN_COLUMNS:
                raise ValueError(f"the columns should be {', '.join(RUN_COLUMNS)}")
            for cells in filter(None, lines):
                row = dict(zip(RUN_COLUMNS, cells, strict=True))
                for key, text in list(row.items())[1:]:
                    value, low = float(text), -math.inf if key in ANY_SIGN else 0
                    if not low < value < math.inf:
                        raise ValueError(f"{key}={text}")
                    row[key] = int(text) if text.isdigit() else value
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}: line {lines.line_num}: {error}") from error
    if len(rows) > sum(map(len, arms_of(rows).values())):
        raise UserError(f"{path}: a seed of an arm stands there twice")
    return rows


def read_results(folder: Path) -> list[dict]:
    """The rows of a folder's runs.csv, [] without one. Raises UserError where that or table.md is
    not of this module: they would be replaced."""
    made = folder / "table.md"
    if made.exists() and not made.read_bytes().startswith(FIRST_CELLS.encode()):
        raise UserError(f"{made}: not a table of tools.compare; move it, or take another folder")
    runs = folder / "runs.csv"
    return read_csv(runs) if runs.exists() else []


def write(folder: Path, rows: list[dict]) -> None:
    """runs.csv in the folder, which is made. Raises UserError where that would lose a run."""
    kept = {(row["arm"], row["seed"], row["val_loss"]) for row in rows}
    for arm, seed, loss in ((r["arm"], r["seed"], r["val_loss"]) for r in read_results(folder)):
        if (arm, seed, loss) not in kept:
            what = f"holds a run of {arm}, seed {seed}, that is not among these"
            raise UserError(f"{folder}: {what}; name its arm as well, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    writer = csv.DictWriter(file, RUN_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "runs.csv", file.getvalue())


def t_test(differences: list[float]) -> float:
    """Two-sided p-value of a paired t-test: how likely so large a mean would be by chance alone.
    nan for fewer than 2."""
    n = len(differences)
    if n < 2:
        return math.nan
    middle, deviation = mean(differences), stdev(differences)
    if deviation == 0:
        return 1.0 if middle == 0 else 0.0
    t, df = middle / deviation * math.sqrt(n), n - 1  # Student's
    return float(betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def arms_of(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> row."""
    arms: dict[str, dict[int, dict]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    return arms


def paired(runs: dict[int, dict], base: dict[int, dict]) -> list[float]:
    """The differences in loss of two arms, on the seeds that both have."""
    return [runs[s]["val_loss"] - base[s]["val_loss"] for s in sorted(runs) if s in base]


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table(rows: list[dict], reference: str) -> str:
    """A Markdown table of the arms: mean and standard deviation over seeds, and the difference to
    the reference on the seeds that both have, with its p-value; lowest difference first.
    """
    by_arm, lines = arms_of(rows), []
    for arm, runs in by_arm.items():
        of = {key: [row[key] for row in runs.values()] for key in RUN_COLUMNS[2:]}
        pairs = paired(runs, by_arm[reference])
        against = ""
        if arm != reference and pairs:
            p = t_test(pairs)
            against = f"{mean(pairs):+.4f}" + ("" if math.isnan(p) else f" ({p:.2g})")
        cells = [arm, str(len(runs)), spread(of["val_loss"]), spread(of["val_bpb"]), against]
        for key, form in (("params", ",.0f"), ("tokens", ",.0f"), ("flops", ".3g")):
            cells.append(f"{mean(of[key]):{form}}")
        cells += [f"{mean(of['seconds']):.0f}", f"{mean(of['prune_cost']):.3f}"]
        lines.append((mean(pairs) if pairs else math.inf, f"| {' | '.join(cells)} |"))
    others = "| parameters | tokens | FLOPs | seconds | prunes cost |"
    text = [f"{FIRST_CELLS} minus {reference} (p) {others}", "| --- " * 10 + "|"]
    text += [line for _, line in sorted(lines, key=lambda pair: pair[0])]
    if all(len(runs) == 1 for runs in by_arm.values()):
        text += ["", "One seed: no difference in this table proves anything."]
    elif len({tuple(sorted(runs)) for runs in by_arm.values()}) > 1:
        text += ["", "Arms have different seeds: compare the differences, not the losses."]
    return "\n".join(text) + "\n"


def report(folder: Path, reference: str = "idea") -> None:
    """table.md from runs.csv alone."""
    rows = read_results(folder)
    if reference not in arms_of(rows):
        there = ", ".join(arms_of(rows)) or "no runs.csv"
        raise UserError(f"{folder}: has no arm {reference!r}; it has {there}")
    text = table(rows, reference)
    write_text(folder / "table.md", text)
    print(text)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=expanded, metavar="FOLDER")
    parser.add_argument("reference", nargs="?", default="idea", metavar="REFERENCE")
    args = parser.parse_args(argv)
    report(args.folder, args.reference)


if __name__ == "__main__":
    sys.exit(main())
