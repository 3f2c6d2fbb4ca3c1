"""table.md of a comparison, from its runs.csv: python -m tools.results FOLDER [REFERENCE]"""

import csv
import io
import math
from pathlib import Path
from statistics import mean, stdev

from mpmath import betainc  # torch installs it

from run import UserError
from run.checkpoint import write_text
from tools import ArgumentParser, expanded, program

# Of runs.csv. prune_cost: the rise of the loss on the same batches, summed over the run's prunes
COLUMNS = {"arm": str, "seed": int, "val_loss": float, "val_bpb": float, "params": int}
COLUMNS |= {"tokens": int, "flops": int, "seconds": float, "prune_cost": float}

Arms = dict[str, dict[int, dict]]  # arm -> seed -> row


def as_row(values: dict) -> dict:
    """What runs.csv holds of them. Raises LookupError, TypeError, ValueError: a number is missing,
    not finite or, from `val_loss` to `seconds`, not above 0."""
    row = {key: kind(values[key]) for key, kind in COLUMNS.items()}
    *above_0, cost = list(row.values())[2:]
    if not (all(0 < x < math.inf for x in above_0) and math.isfinite(cost)):
        raise ValueError("a number that is not finite, or not above 0")
    return row


def read_csv(path: Path) -> Arms:
    """The rows of all arms. Raises UserError for other columns or cells, for what is no row, and
    for a run that comes twice."""
    arms: Arms = {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            if lines.fieldnames != [*COLUMNS]:
                raise ValueError(f"the columns should be {', '.join(COLUMNS)}")
            for line in lines:
                runs, row = arms.setdefault(line["arm"], {}), as_row(line)
                if None in line or row["seed"] in runs:
                    raise ValueError("more cells than columns, or a run that comes twice")
                runs[row["seed"]] = row
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path}: line {lines.line_num}: {error}") from error
    return arms


def read_results(folder: Path) -> Arms:
    """The rows of a folder's runs.csv, none without one. Raises UserError where that or table.md is
    not of this module: they would be replaced."""
    runs, made = folder / "runs.csv", folder / "table.md"
    if made.exists() and not runs.exists():
        raise UserError(f"{made}: has no runs.csv beside it; move it, or take another folder")
    return read_csv(runs) if runs.exists() else {}


def write(folder: Path, arms: Arms) -> None:
    """runs.csv in the folder, which is made. Raises UserError where that would lose a run."""
    for arm, runs in read_results(folder).items():
        for seed, row in runs.items():
            if (ours := arms.get(arm, {}).get(seed, {}).get("val_loss", "none")) != row["val_loss"]:
                what = f"holds {arm}, seed {seed}, val_loss={row['val_loss']}; this call has {ours}"
                way = "name its arm as well, put its value back, or give another --out"
                raise UserError(f"{folder}: {what}; {way}")
    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    rows = [[row[key] for key in COLUMNS] for runs in arms.values() for row in runs.values()]
    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(folder / "runs.csv", file.getvalue())


def t_test(differences: list[float]) -> float:
    """Two-sided p of a paired t-test: how likely so large a mean is by chance; nan below 2."""
    if len(differences) < 2:
        return math.nan
    df, middle = len(differences) - 1, mean(differences)
    noise = df * stdev(differences) ** 2
    share = noise / (noise + (df + 1) * middle**2) if middle else 1  # df / (df + Student's t ** 2)
    return float(betainc(df / 2, 0.5, 0, share, regularized=True))


def paired(runs: dict[int, dict], base: dict[int, dict]) -> list[float]:
    """The differences in loss of two arms, on the seeds that both have."""
    return [runs[s]["val_loss"] - base[s]["val_loss"] for s in sorted(runs) if s in base]


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table(arms: Arms, reference: str) -> str:
    """A Markdown table of the arms: mean and standard deviation over seeds, and the difference to
    the reference on the seeds that both have, with its p-value; lowest difference first."""
    lines = {}  # each with the difference
    for arm, runs in arms.items():
        loss, bpb, *others = ([row[key] for row in runs.values()] for key in list(COLUMNS)[2:])
        params, tokens, flops, seconds, cost = map(mean, others)
        pairs = paired(runs, arms[reference])
        against = f"{mean(pairs):+.4f}" if pairs and arm != reference else ""
        if against and len(pairs) > 1:
            against += f" ({t_test(pairs):.2g})"
        line = f"| {arm} | {len(runs)} | {spread(loss)} | {spread(bpb)} | {against} "
        line += f"| {params:,.0f} | {tokens:,.0f} | {flops:.3g} | {seconds:.0f} | {cost:.3f} |"
        lines[line] = mean(pairs) if pairs else math.inf
    heads = f"| arm | seeds | loss, nats/token | bits/byte | minus {reference} (p) "
    text = [f"{heads}| parameters | tokens | FLOPs | seconds | prunes cost |", "| --- " * 10 + "|"]
    text += sorted(lines, key=lines.get)
    if all(len(runs) == 1 for runs in arms.values()):
        text += ["", "One seed: no difference in this table proves anything."]
    elif len({tuple(sorted(runs)) for runs in arms.values()}) > 1:
        text += ["", "Arms have different seeds: compare the differences, not the losses."]
    return "\n".join(text) + "\n"


def report(folder: Path, reference: str = "idea") -> None:
    """table.md from runs.csv alone."""
    arms = read_csv(folder / "runs.csv")
    if reference not in arms:
        raise UserError(f"{folder}: has no arm {reference!r}; it has {', '.join(arms)}")
    write_text(folder / "table.md", text := table(arms, reference))
    print(text)


@program
def main(parser: ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("folder", type=expanded, metavar="FOLDER")
    parser.add_argument("reference", nargs="?", default="idea", metavar="REFERENCE")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
