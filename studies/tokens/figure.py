"""Small model minus IDEA, by tokens per final parameter: a table and a figure of comparisons.

python -m studies.tokens.figure studies/{default,lab,tokens/*}/ \\
    --to studies/tokens
"""

import argparse
from pathlib import Path
from statistics import mean

from tools.figures import open_figure
from tools.results import arms_of, paired, read_csv, t_test

ARMS = {"scratch": "on the same tokens", "scratch_flops": "on the same FLOPs"}
TRAIN = {"speeches": 3_949_534, "dictionary": 15_512_332}  # tokens of the training split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="results of tools.compare")
    parser.add_argument("--to", type=Path, required=True, help="folder of table.md, tokens.png")
    args = parser.parse_args()
    found = []  # (final parameters, text), tokens for each, arm -> differences
    for folder in (f for f in args.folders if (f / "runs.csv").exists()):  # some have a search only
        arms = arms_of(read_csv(folder / "runs.csv"))
        run = next(iter(arms["idea"].values()))
        pairs = {arm: paired(arms[arm], arms["idea"]) for arm in ARMS if arm in arms}
        text = "dictionary" if folder.name.startswith(("dictionary", "gcide")) else "speeches"
        found.append(((run["params"], text), run["tokens"] / run["params"], pairs))
    found.sort(key=lambda row: row[:2])

    lines = [
        f"| final parameters | text | tokens for each | epochs | {' | '.join(ARMS.values())} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    figure, axes = open_figure(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, (arm, words) in zip(axes[0], ARMS.items()):
        panel.set_title(f"small model, {words}")
        panel.axhline(0, color="black", lw=0.8)
        panel.set_xscale("log")
        panel.set_xlabel("tokens for each final parameter")
        panel.axvline(1540, color="0.6", lw=0.8, ls="--")
        panel.text(
            1480, 0.02, "the paper", rotation=90, ha="right", color="0.4",
            transform=panel.get_xaxis_transform(),
        )  # fmt: skip
        for i, series in enumerate(sorted({series for series, *_ in found})):
            points = [(t, pairs[arm]) for s, t, pairs in found if s == series and arm in pairs]
            if not points:
                continue
            for tokens, pairs in points:
                panel.plot([tokens] * len(pairs), pairs, "o", color=f"C{i}", alpha=0.4, ms=4, mew=0)
            tokens, means = zip(*((tokens, mean(pairs)) for tokens, pairs in points))
            panel.plot(tokens, means, "o-", color=f"C{i}", label=f"{series[0]:,}, {series[1]}")
        panel.set_xticks([16, 64, 256, 1024], [16, 64, 256, 1024])
        panel.minorticks_off()
    axes[0, 0].set_ylabel("its loss minus IDEA's, nats per token")
    axes[0, 1].legend(title="final parameters, text")
    for (params, text), tokens, pairs in found:
        cells = [f"{params:,}", text, f"{tokens:.0f}", f"{tokens * params / TRAIN[text]:.1f}"]
        for d in (pairs.get(arm, []) for arm in ARMS):
            cells.append(f"{mean(d):+.4f} ({len(d)} seeds, p = {t_test(d):.2g})" if d else "")
        lines.append(f"| {' | '.join(cells)} |")
    (args.to / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure.savefig(args.to / "tokens.png", dpi=130)


if __name__ == "__main__":
    main()
