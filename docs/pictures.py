"""Pictures of the README. method.png comes from schedule.py alone: python -m docs.pictures

`python -m studies.results` draws results.png and studies/tests.png. All need matplotlib.
"""

import sys
from pathlib import Path
from statistics import mean

from schedule import Schedule, knobs
from tools import command
from tools.figures import open_figure

BLUE, ORANGE, GREY, RED, GREEN = "#2f6fb7", "#d9730d", "#8b949e", "#e5484d", "#1f7a46"
# configs/idea.py, with the rate as a share of its peak, and the same with one prune and a restart
IDEA = {"d_ff": 512, "d_ff_target": 176, "round_to": 16, "learning_rate": 1.0}
IDEA |= {"warmup_steps": 50, "min_lr_fraction": 0.01, "max_steps": 1000}
USUAL = IDEA | {"prune_schedule": "oneshot", "prune_start": 0.35, "lr_restart": True}
COLORS = {"Muon": BLUE, "AdamW": ORANGE, "both": "0.25"}


def method():
    """Width and learning rate over tokens: the usual pipeline, and IDEA Prune."""
    figure, axes = open_figure(2, 2, figsize=(9.2, 3.6), sharey="row", height_ratios=(1.4, 1))
    titles = "Usual: train, prune, train again", "IDEA Prune: one run, one cosine"
    steps = range(1, 1001)
    for (top, low), settings, color, title in zip(axes.T, (USUAL, IDEA), (GREY, BLUE), titles):
        s = Schedule(knobs(**settings))
        widths = [s.width(step, "d_ff") for step in steps]
        top.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=12)
        top.fill_between(steps, widths, step="post", color=color, alpha=0.25, lw=0)
        top.plot(steps, widths, drawstyle="steps-post", color=color, lw=2)
        for step in s.prune_steps():
            top.vlines(step, s.width(step, "d_ff"), s.width(step - 1, "d_ff"), color=RED, lw=3)
        top.axhline(176, color="0.35", lw=1, ls=":")
        top.set(ylim=(0, 560), yticks=[176, 512])
        low.plot(steps, [s.learning_rate(step) for step in steps], color=color, lw=2)
        low.set(ylim=(0, 1.15), yticks=[], xlim=(-10, 1040), xlabel="training tokens →")
        ends = sorted({*s.window, 1001})  # the first steps of what follows
        low.set_xticks(ends, [f"{step // 10}%" for step in ends])
        for panel in (top, low):
            panel.spines["left"].set_visible(False)
            panel.tick_params(length=0)
            panel.grid(False)
    (usual, idea), (usual_rate, idea_rate) = axes
    for x, word in ((175, "train"), (365, "prune"), (675, "train again")):
        side, color = ("left", RED) if word == "prune" else ("center", "0.15")
        usual.text(x, 530, word, color=color, ha=side, va="bottom")
    usual.text(1000, 190, "the size you want", ha="right", color="0.35")
    curve = Schedule(knobs(**IDEA | {"round_to": 1, "prune_every": 1}))
    idea.plot(steps, [curve.width(step, "d_ff") for step in steps], "--", color="0.35", lw=1)
    words = {"color": "0.35", "arrowprops": {"arrowstyle": "->", "color": "0.35"}, "va": "center"}
    idea.annotate(
        "a cubic curve, rounded up to\nmultiples of 16: the last cut waits",
        (305, 193),
        (480, 400),
        **words,
    )
    usual_rate.text(600, 0.95, "the rate rises again,\nwith a fresh optimizer", va="center")
    for x, word, side in (
        (90, "enlarged", "right"),
        (226, "prune:\n10 to 35%", "center"),
        (675, "recover", "center"),
    ):
        idea.text(x, 590, word, ha=side, va="top", color=RED if x == 226 else "0.15")
    for panel in (idea, idea_rate):
        for x in s.window:
            panel.axvline(x, color="0.75", lw=0.8, zorder=0)
    for panel, words in ((usual, "neurons\nper layer"), (usual_rate, "learning\nrate")):
        panel.set_ylabel(words, rotation=0, ha="right", va="center")
    return figure


def leads(rows: list):
    """rows, of studies/results.py: (what is compared, tokens, optimizer, pruned at), and what came
    out. A dot is a mean with its 95% interval, hollow if 0 is in it."""
    size = {"figsize": (9.6, 4), "width_ratios": (3, 3, 1.5), "sharex": False, "sharey": True}
    figure, ((tokens, flops, cosine),) = open_figure(1, 3, **size)
    for panel, part, title, better, worse in (
        (cosine, "cosine", "On the speeches,\none cosine wins", "one shot", "naive"),
        (
            tokens,
            "tokens",
            "Equal tokens: IDEA leads from\n36 per parameter, if early",
            "IDEA",
            "small model",
        ),
        (flops, "FLOPs", "Equal FLOPs: mostly,\nwe cannot tell", "IDEA", "small model"),
    ):
        some = [(cells, e) for (compared, *cells), e in rows if part in compared]
        names = ["\n".join([*cells, str(len(e.tests))]) for cells, e in some]
        for old, new in {" to ": "–", " and more": "+", ", a dictionary": "", "once, ": ""}.items():
            names = [name.replace(old, new) for name in names]
        groups = {0: "speeches", 1: "dictionary"}  # place -> what stands there
        if panel is not cosine:  # the last two prune late
            groups = {1.5: "pruned early", 4.5: "pruned late"}
            panel.axvline(len(names) - 2.5, color="0.6", lw=1, ls=":")
        for x, words in groups.items():
            panel.text(x, -0.083, words, fontsize=10, ha="center")
        for x, (_, e) in enumerate(some):
            color = GREEN if e.low > 0 else ORANGE if e.high < 0 else GREY
            panel.vlines(x, e.low, e.high, color=color, lw=2.5)
            fill = "white" if color == GREY else color
            panel.plot(x, e.mean, "o", ms=8, mew=2, color=fill, mec=color)
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.set(xlim=(-0.6, len(names) - 0.4), ylim=(-0.085, 0.04))
        panel.axhline(0, color="0.3", lw=1)
        panel.axhspan(0, 0.04, color=GREEN, alpha=0.06, lw=0)
        panel.set_title(title, fontsize=11, fontweight="bold", loc="left")
        panel.text(-0.55, 0.0375, f"{better} better ↑", color=GREEN, va="top")
        panel.text(len(names) - 0.45, -0.073, f"{worse} better ↓", color=ORANGE, ha="right")
        panel.grid(visible=False, axis="x")
    tokens.set_ylabel("lead in nats (0.01 is 1% of perplexity)")
    heads = "tokens/parameter\noptimizer\npruned at\ntests"
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    tokens.annotate(heads, (0, 0), (-5, -8), fontsize=8, **at)
    words = "cannot tell: 0 is in the 95% interval"
    tokens.plot([], [], "o", ms=8, mew=2, mec=GREY, mfc="white", label=words)
    tokens.legend(loc=(0, 0.2), frameon=False, handlelength=1)
    return figure


def forest(rows: list):
    """All rows, with their tests (faint dots), and of their pairs how many are above 0."""
    figure, axes = open_figure(1, 1, figsize=(7, 5))
    panel, labels = axes[0, 0], []
    for (compared, *cells), e in rows:
        if compared not in labels:
            labels.append(compared)
        y, color = len(labels), COLORS[cells[1]]
        labels.append(", ".join(cells))
        panel.text(1.02, y, e.pairs, transform=panel.get_yaxis_transform(), va="center")
        panel.hlines(y, e.low, e.high, color=color, lw=2)
        panel.plot(e.mean, y, "o", color=color)
        means = [mean(d) for d in e.tests]
        panel.plot(means, [y + 0.3] * len(means), "o", ms=4, color=color, alpha=0.4, mew=0)
    panel.set_yticks(range(len(labels)), labels)
    for label in panel.get_yticklabels():
        if "against" in label.get_text():
            label.set_fontweight("bold")
    panel.axvline(0, color="0.3", lw=1)
    panel.set(ylim=(len(labels), -1), xlabel="lead of the first, nats per token →")
    panel.set_title(
        "tokens for each final parameter, optimizer, pruned at", loc="right", x=0, fontsize=9
    )
    panel.set_title("pairs above 0", loc="left", x=1, fontsize=9)
    panel.xaxis.set_major_formatter("{x:+.2f}")
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    return figure


def save(figure, path: str) -> None:
    figure.savefig(Path(__file__).parents[1] / path, dpi=130, bbox_inches="tight")
    print(path)


@command
def main(argv: list[str] | None = None) -> None:
    save(method(), "docs/method.png")


if __name__ == "__main__":
    sys.exit(main())
