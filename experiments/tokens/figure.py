"""Small model minus IDEA, by tokens per final parameter: a table and a figure of comparisons.

python -m experiments.tokens.figure results/{default,lab,tokens/*}/ --to results/tokens
"""

import argparse
from pathlib import Path
from statistics import mean

from tools.plot import open_figure
from tools.results import arms_of, paired, read_csv, t_test

ARMS = {"scratch": "on the same tokens", "scratch_flops": "on the same FLOPs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="results of tools.compare")
    parser.add_argument("--to", type=Path, required=True, help="folder of table.md, tokens.png")
    args = parser.parse_args()
    found = []  # (final parameters, tokens for each, arm -> differences)
    for folder in args.folders:
        arms = arms_of(read_csv(folder / "runs.csv"))
        run = next(iter(arms["idea"].values()))
        pairs = {arm: paired(arms[arm], arms["idea"]) for arm in ARMS}
        found.append((run["params"], run["tokens"] / run["params"], pairs))
    found.sort(key=lambda row: row[:2])

    lines = [
        f"| final parameters | tokens for each | {' | '.join(ARMS.values())} |",
        "| --- | --- | --- | --- |",
    ]
    figure, axes = open_figure(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, (arm, words) in zip(axes[0], ARMS.items()):
        panel.set_title(f"small model, {words}")
        panel.axhline(0, color="black", lw=0.8)
        panel.set_xscale("log")
        panel.set_xlabel("tokens for each final parameter")
        for color, size in zip(("C0", "C3"), sorted({params for params, *_ in found})):
            points = [(tokens, pairs[arm]) for params, tokens, pairs in found if params == size]
            for tokens, pairs in points:
                panel.plot([tokens] * len(pairs), pairs, "o", color=color, alpha=0.4, ms=4, mew=0)
            tokens, means = zip(*((tokens, mean(pairs)) for tokens, pairs in points))
            panel.plot(tokens, means, "-", color=color, label=f"{size:,} parameters")
        panel.set_xticks([16, 32, 64, 128], [16, 32, 64, 128])
        panel.minorticks_off()
    axes[0, 0].set_ylabel("its loss minus IDEA's, nats per token")
    axes[0, 1].legend()
    for params, tokens, pairs in found:
        cells = [f"{params:,}", f"{tokens:.0f}"]
        for d in (pairs[arm] for arm in ARMS):
            cells.append(f"{mean(d):+.4f} ({len(d)} seeds, p = {t_test(d):.2g})")
        lines.append(f"| {' | '.join(cells)} |")
    (args.to / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure.savefig(args.to / "tokens.png", dpi=130)


if __name__ == "__main__":
    main()
