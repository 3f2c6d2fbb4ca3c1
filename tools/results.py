"""Table and figure of a comparison, from its csv files: python -m tools.results FOLDER [REFERENCE]

runs.csv has a row a run, curves.csv one a validation and, of one seed, one a logged step. table.md
comes out of them byte for byte.
"""

import csv
import io
import math
import sys
from pathlib import Path
from statistics import mean, stdev

from run import UserError
from run.checkpoint import write_text
from tools import command
from tools.plot import open_figure

# prune_cost: the rise of the loss on the same batches, summed over the run's prunes
RUN_COLUMNS = ["arm", "seed", "val_loss", "val_bpb", "params", "tokens", "flops", "seconds"]
RUN_COLUMNS += ["prune_cost"]
CURVE_COLUMNS = ["arm", "seed", "tokens", "flops", "val_loss", "params", "lr"]


def write(folder: Path, runs: list[dict], curves: list[dict]) -> None:
    """runs.csv and curves.csv in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (("runs", RUN_COLUMNS, runs), ("curves", CURVE_COLUMNS, curves)):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())


def read_csv(path: Path) -> list[dict]:
    """The rows, with numbers as they were written: whole ones as int, so that they come out again
    byte for byte."""

    def value(key: str, text: str) -> str | int | float:
        if key == "arm" or not text:
            return text
        return int(text) if text.isdigit() else float(text)

    with open(path, newline="") as file:
        return [{k: value(k, text) for k, text in row.items()} for row in csv.DictReader(file)]


def t_test(differences: list[float]) -> float:
    """Two-sided p-value of a paired t-test: how likely so large a mean would be by chance alone.

    Student's t density integrated by Simpson's rule, exact to about 1e-9. nan for fewer than 2.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    middle, deviation = mean(differences), stdev(differences)
    if deviation == 0:
        return 1.0 if middle == 0 else 0.0
    t, df = abs(middle) / deviation * math.sqrt(n), n - 1
    # With x = sqrt(df) tan(a) the density becomes c cos(a)^(df-1), for a up to atan(t / sqrt(df))
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    end, parts = math.atan(t / math.sqrt(df)), 2000
    weights = [1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1)]
    inside = sum(w * math.cos(end * i / parts) ** (df - 1) for i, w in enumerate(weights))
    return max(0.0, 1 - 2 * c * inside * end / parts / 3)


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table(rows: list[dict], reference: str) -> str:
    """A Markdown table of the arms: mean and standard deviation over seeds, and the difference to
    the reference on the seeds that both have, with its p-value; lowest difference first.
    """
    by_arm: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    base, lines = by_arm[reference], []
    for arm, runs in by_arm.items():
        of = {key: [run[key] for run in runs.values()] for key in RUN_COLUMNS[2:]}
        pairs = [runs[s]["val_loss"] - base[s]["val_loss"] for s in sorted(runs) if s in base]
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


def draw(curves: list[dict], folder: Path) -> None:
    """Loss over tokens and over FLOPs, parameters and learning rate beneath: mean over seeds. Arms
    with fewer seeds than others are left out, their means would mislead.
    """
    size = {"figsize": (10, 7.5), "height_ratios": (3, 1, 1)}
    figure, axes = open_figure(3, 2, sharey="row", **size)
    judged = [row for row in curves if row["val_loss"] != ""]
    seeds: dict[str, set] = {}
    for row in judged:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    most = max(map(len, seeds.values()))
    arms = [arm for arm in seeds if len(seeds[arm]) == most]
    for i, arm in enumerate(arms):
        style = {"color": f"C{i}", "ls": "-" if i < 10 else "--", "lw": 1.2, "label": arm}
        points: dict[float, list[dict]] = {}
        for row in judged:
            if row["arm"] == arm:
                points.setdefault(row["tokens"], []).append(row)
        first = [r for r in curves if r["arm"] == arm and r["seed"] == min(seeds[arm])]
        for x, (loss, params, rate) in zip(("tokens", "flops"), axes.T):
            means = [[mean([r[k] for r in rs]) for rs in points.values()] for k in (x, "val_loss")]
            loss.plot(*means, **style)
            params.step([r[x] for r in first], [r["params"] for r in first], **style)
            rate.plot([r[x] for r in first], [r["lr"] for r in first], **style)
    final = min(row["val_loss"] for row in judged)
    axes[0, 0].set_ylim(final - 0.05, final + 0.8)
    labels = ("validation loss, nats/token", "parameters", "learning rate")
    for ax, label in zip(axes[:, 0], labels):
        ax.set_ylabel(label)
    axes[2, 1].set_xlabel("training FLOPs")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)


def report(folder: Path, reference: str = "idea") -> None:
    """table.md and, where matplotlib is installed, the figure, from the two .csv files alone."""
    text = table(read_csv(folder / "runs.csv"), reference)
    write_text(folder / "table.md", text)
    print(text)
    try:
        draw(read_csv(folder / "curves.csv"), folder)
    except UserError as error:  # no matplotlib: the table is what counts
        print(error, file=sys.stderr)


@command
def main(argv: list[str] | None = None) -> None:
    folder, *reference = sys.argv[1:] if argv is None else argv
    report(Path(folder), *reference)


if __name__ == "__main__":
    sys.exit(main())
