"""Small model minus IDEA, by tokens for each final parameter, in all tests: table.md and tokens.png

python -m studies.tokens.figure
"""

from pathlib import Path
from statistics import mean

from tools.figures import open_figure
from tools.results import paired, read_csv, t_test

STUDIES = Path(__file__).parent.parent
TRAIN = {"speeches": 3_949_534, "dictionary": 15_512_332}  # tokens of the training split
TRAIN |= {"speeches, 4%": 172_512, "speeches, 17%": 690_048}
FOLDERS = dict.fromkeys(["lab", "default", "units/axes_lab"], "speeches")
FOLDERS |= {"limited": "speeches, 4%", "limited/twelve": "speeches, 17%"}
for path in (STUDIES / "tokens").glob("*/runs.csv"):
    text = "dictionary" if path.parent.name.startswith("dictionary") else "speeches"
    FOLDERS[f"tokens/{path.parent.name}"] = text
ARMS = {"scratch": "same tokens", "scratch_flops": "same FLOPs"}


def tests() -> list[tuple]:
    """(final parameters, text), tokens for each, folder, arm -> its losses minus IDEA's."""
    found = []
    for folder, text in FOLDERS.items():
        arms = read_csv(STUDIES / folder / "runs.csv")
        run = next(iter(arms["idea"].values()))
        pairs = {arm: paired(arms[arm], arms["idea"]) for arm in ARMS if arm in arms}
        found.append(((run["params"], text), run["tokens"] / run["params"], folder, pairs))
    return sorted(found, key=lambda test: test[:3])


def table(found: list[tuple]) -> str:
    heads = ["final parameters", "text", "tokens for each", "epochs", *ARMS.values(), "folder"]
    lines = [heads, ["---"] * len(heads)]
    for (params, text), tokens, folder, pairs in found:
        cells = [f"{params:,}", text, f"{tokens:.0f}", f"{tokens * params / TRAIN[text]:.1f}"]
        for d in (pairs.get(arm, []) for arm in ARMS):
            cells.append(f"{mean(d):+.4f} ({len(d)} seeds, p = {t_test(d):.2g})" if d else "")
        lines.append([*cells, f"`{folder}/`"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(found: list[tuple]):
    """Texts and sizes with more than one number of tokens; without rates chosen elsewhere."""
    found = [test for test in found if not test[2].endswith("untuned")]
    several = sorted({a[0] for a in found if sum(a[0] == b[0] for b in found) > 1})
    figure, axes = open_figure(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, (arm, words) in zip(axes[0], ARMS.items()):
        panel.set_title(f"small model, {words}")
        panel.axhline(0, color="black", lw=0.8)
        panel.set_xscale("log")
        panel.set_xlabel("tokens for each final parameter")
        panel.axvline(1540, color="0.6", lw=0.8, ls="--")  # the paper's
        for i, series in enumerate(several):
            points = [(x, d[arm]) for s, x, _, d in found if s == series and arm in d]
            for x, d in points:
                panel.plot([x] * len(d), d, "o", color=f"C{i}", alpha=0.4, ms=4, mew=0)
            means = [(x, mean(d)) for x, d in points]
            panel.plot(*zip(*means), "o-", color=f"C{i}", label=f"{series[0]:,}, {series[1]}")
        panel.set_xticks([16, 64, 256, 1024], [16, 64, 256, 1024])
        panel.minorticks_off()
    axes[0, 0].set_ylabel("its loss minus IDEA's, nats per token")
    title = "final parameters, text; dashed: the paper"
    axes[0, 0].legend(title=title, loc="lower right", fontsize=8, title_fontsize=8)
    return figure


def main() -> None:
    found = tests()
    text = table(found)
    (STUDIES / "tokens" / "table.md").write_text(text)
    print(text)
    draw(found).savefig(STUDIES / "tokens" / "tokens.png", dpi=130)


if __name__ == "__main__":
    main()
