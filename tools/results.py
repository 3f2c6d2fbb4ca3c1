"""Table and figure of a comparison, from its csv files: python -m tools.results results/NAME

runs.csv has a row a run, curves.csv one a validation and, of one seed, one a logged step. table.md
comes out of them byte for byte.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from statistics import mean, stdev

from run.checkpoint import write_text

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
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    t, df = abs(mean) / math.sqrt(variance / n), n - 1
    # With x = sqrt(df) tan(a) the density becomes c cos(a)^(df-1), for a up to atan(t / sqrt(df))
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    end, parts = math.atan(t / math.sqrt(df)), 2000
    weights = [1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1)]
    inside = sum(w * math.cos(end * i / parts) ** (df - 1) for i, w in enumerate(weights))
    return max(0.0, 1 - 2 * c * inside * end / parts / 3)


def table(rows: list[dict], reference: str) -> str:
    """A Markdown table of the arms: mean and standard deviation over seeds, and the difference to
    the reference on the seeds that both have, with its p-value; lowest difference first.
    """
    by_arm: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[int(row["seed"])] = row
    lines = [
        f"| arm | seeds | loss, nats/token | bits/byte | minus {reference} (p) "
        "| parameters | tokens | FLOPs | seconds | prunes cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = by_arm[reference]

    def of(runs: dict[int, dict], key: str) -> list[float]:
        return [run[key] for run in runs.values()]

    def with_spread(values: list[float]) -> str:
        return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")

    def differences(runs: dict[int, dict]) -> list[float]:
        return [runs[s]["val_loss"] - base[s]["val_loss"] for s in sorted(runs) if s in base]

    def order(item: tuple[str, dict]) -> float:  # arms may have other seeds, and those other luck
        pairs = differences(item[1])
        return mean(pairs) if pairs else math.inf

    for arm, runs in sorted(by_arm.items(), key=order):
        loss, bits = with_spread(of(runs, "val_loss")), with_spread(of(runs, "val_bpb"))
        pairs = differences(runs)
        against = ""
        if arm != reference and pairs:
            p = t_test(pairs)
            against = f"{mean(pairs):+.4f}" + ("" if math.isnan(p) else f" ({p:.2g})")
        lines.append(
            f"| {arm} | {len(runs)} | {loss} | {bits} | {against} "
            f"| {mean(of(runs, 'params')):,.0f} | {mean(of(runs, 'tokens')):,.0f} "
            f"| {mean(of(runs, 'flops')):.3g} | {mean(of(runs, 'seconds')):.0f} "
            f"| {mean(of(runs, 'prune_cost')):.3f} |"
        )
    if all(len(runs) == 1 for runs in by_arm.values()):
        lines += ["", "One seed: no difference in this table proves anything."]
    elif len({tuple(sorted(runs)) for runs in by_arm.values()}) > 1:
        lines += ["", "Arms have different seeds: compare the differences, not the losses."]
    return "\n".join(lines) + "\n"


def draw(curves: list[dict], folder: Path) -> None:
    """Loss over tokens and over FLOPs, parameters and learning rate beneath: mean over seeds. Arms
    with fewer seeds than others are left out, their means would mislead.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "0", "font.size": 9})  # the same bytes every time
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, 2, sharex="col", sharey="row", figsize=(10, 7.5), height_ratios=(3, 1, 1),
        constrained_layout=True,
    )  # fmt: skip
    judged = [row for row in curves if row["val_loss"] != ""]
    final = min(row["val_loss"] for row in judged)
    seeds: dict[str, set] = {}
    for row in judged:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    most = max(map(len, seeds.values()))
    arms = [arm for arm in seeds if len(seeds[arm]) == most]
    colors = matplotlib.colormaps["tab10" if len(arms) <= 10 else "tab20"]
    for i, arm in enumerate(arms):
        points: dict[float, list[dict]] = {}
        for row in judged:
            if row["arm"] == arm:
                points.setdefault(row["tokens"], []).append(row)
        of_one = [r for r in curves if r["arm"] == arm and r["seed"] == min(seeds[arm])]
        for column, x in enumerate(("tokens", "flops")):
            style = {"color": colors(i), "lw": 1.2, "label": arm}
            xs = [mean([r[x] for r in rows]) for rows in points.values()]
            ys = [mean([r["val_loss"] for r in rows]) for rows in points.values()]
            axes[0, column].plot(xs, ys, **style)
            xs = [r[x] for r in of_one]
            axes[1, column].step(xs, [r["params"] for r in of_one], **style)
            axes[2, column].plot(xs, [r["lr"] for r in of_one], **style)
            axes[2, column].set_xlabel("training " + {"tokens": "tokens", "flops": "FLOPs"}[x])
    axes[0, 0].set_ylim(final - 0.05, final + 0.8)
    for line, label in enumerate(("validation loss, nats/token", "parameters", "learning rate")):
        axes[line, 0].set_ylabel(label)
    axes[0, 1].legend(frameon=False, fontsize=8)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, lw=0.5)
    figure.savefig(folder / "curves.png", dpi=110)
    figure.savefig(folder / "curves.svg", metadata={"Date": None})


def report(folder: Path, reference: str) -> None:
    """table.md and the figure, from the two .csv files alone."""
    text = table(read_csv(folder / "runs.csv"), reference)
    write_text(folder / "table.md", text)
    print(text)
    try:
        draw(read_csv(folder / "curves.csv"), folder)
    except ModuleNotFoundError as error:
        print(f"no figure: {error}; pip install matplotlib", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="results/NAME")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args = parser.parse_args(argv)
    try:
        report(args.folder, args.reference)
    except (OSError, KeyError) as error:
        print(f"error: {args.folder}: no results of a comparison ({error})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
