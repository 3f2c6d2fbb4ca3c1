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

import numpy as np

from run import UserError
from run.files import write_text
from tools import command

# prune_cost: the rise of the loss on the same batches, summed over the run's prunes
RUN_COLUMNS = ["arm", "seed", "val_loss", "val_bpb", "params", "tokens", "flops", "seconds"]
RUN_COLUMNS += ["prune_cost"]


def write(folder: Path, rows: list[dict]) -> None:
    """runs.csv in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    writer = csv.DictWriter(file, RUN_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "runs.csv", file.getvalue())


def read_csv(path: Path) -> list[dict]:
    """The rows. All but the arm's name are numbers: int where they were written as one. Raises
    UserError for another."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            for key in row.keys() - {"arm"}:
                row[key] = int(row[key]) if row[key].isdigit() else float(row[key])
        except (ValueError, AttributeError) as error:  # a text; too few or too many columns
            raise UserError(f"{path}: line {number}: {error}") from error
    return rows


def two_sided(t: float, df: int) -> float:
    """The probability that Student's t with df degrees of freedom is at least t away from 0: one
    minus the integral of its density from -t to t, exact to about 1e-9.
    """
    # With x = sqrt(df) tan(a) the density becomes c cos(a)^(df-1), for a up to atan(t / sqrt(df))
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    end, middles = math.atan(t / math.sqrt(df)), (np.arange(10_000) + 0.5) / 10_000
    return max(0.0, 1 - 2 * c * end * np.mean(np.cos(end * middles) ** (df - 1)))


def t_test(differences: list[float]) -> float:
    """Two-sided p-value of a paired t-test: how likely so large a mean would be by chance alone.
    nan for fewer than 2."""
    n = len(differences)
    if n < 2:
        return math.nan
    middle, deviation = mean(differences), stdev(differences)
    if deviation == 0:
        return 1.0 if middle == 0 else 0.0
    return two_sided(abs(middle) / deviation * math.sqrt(n), n - 1)


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
    text = [
        f"| arm | seeds | loss, nats/token | bits/byte | minus {reference} (p) "
        "| parameters | tokens | FLOPs | seconds | prunes cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line for _, line in sorted(lines, key=lambda pair: pair[0])),
    ]
    if all(len(runs) == 1 for runs in by_arm.values()):
        text += ["", "One seed: no difference in this table proves anything."]
    elif len({tuple(sorted(runs)) for runs in by_arm.values()}) > 1:
        text += ["", "Arms have different seeds: compare the differences, not the losses."]
    return "\n".join(text) + "\n"


def report(folder: Path, reference: str = "idea") -> None:
    """table.md from runs.csv alone."""
    rows = read_csv(folder / "runs.csv")
    if reference not in arms_of(rows):
        raise UserError(f"{folder}: has no arm {reference!r}; it has {', '.join(arms_of(rows))}")
    text = table(rows, reference)
    (folder / "table.md").write_text(text)
    print(text)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("reference", nargs="?", default="idea", metavar="REFERENCE")
    args = parser.parse_args(argv)
    report(args.folder, args.reference)


if __name__ == "__main__":
    sys.exit(main())
