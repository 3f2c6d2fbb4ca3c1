"""Pictures of the README. method.png comes from schedule.py alone: python -m docs.pictures

`python -m studies.results` draws results.png and studies/settings.png. All need matplotlib.
"""

import math
import sys
from pathlib import Path
from statistics import mean

from data.command import command
from schedule import Schedule, knobs
from tools.plot import BLUE, GREY, RED, open_figure

ORANGE = "#c85200"  # beside BLUE, for who cannot tell red from green
# configs/idea.py in 1,000 steps, with the rate as a share of its peak; and the same with one prune
# and a restart
IDEA = {"d_ff": 256, "d_ff_target": 96, "round_to": 16, "prune_every": 25, "learning_rate": 1.0}
IDEA |= {"warmup_steps": 25, "min_lr_fraction": 0.01, "max_steps": 1000}
USUAL = IDEA | {"prune_schedule": "oneshot", "prune_start": 0.35, "lr_restart": True}
COLORS = {"Muon": BLUE, "AdamW": ORANGE, "both": "0.25"}
# In results.png: rows of studies/results.py (size, tokens, optimizer, pruned at), in words
ROWS = {
    ("58k", "18", "Muon", "10 to 35%"): "few tokens",
    ("58k", "36", "Muon", "10 to 35%"): "some tokens",
    ("263k", "36", "Muon", "10 to 35%"): "some tokens, larger",
    ("467k", "36", "Muon", "10 to 35%"): "some tokens, larger still",
    ("58k", "71 to 142", "Muon", "10 to 35%"): "more tokens",
    ("250k", "65 to 142", "Muon", "10 to 35%"): "more tokens, larger",
    ("58k", "142", "AdamW", "10 to 35%"): "more tokens",
    ("58k", "570", "AdamW", "10 to 35%"): "many tokens",
    ("58k", "570", "AdamW", "50 to 75%"): "many tokens, pruned late",
}


def method():
    """Width and learning rate over tokens: the usual pipeline, and IDEA Prune."""
    size = {"figsize": (9.2, 3.6), "height_ratios": (1.4, 1)}
    figure, axes = open_figure(2, 2, sharex="col", sharey="row", **size)
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
        top.axhline(96, color="0.35", lw=1, ls=":")
        top.set(ylim=(0, 280), yticks=[96, 256])
        low.plot(steps, [s.learning_rate(step) for step in steps], color=color, lw=2)
        low.set(ylim=(0, 1.15), yticks=[], xlim=(-10, 1040), xlabel="training tokens →")
        ends = sorted({*s.window, 1001})  # the first steps of what follows
        low.set_xticks(ends, [f"{step // 10}%" for step in ends])
        for panel in (top, low):
            panel.spines["left"].set_visible(False)
            panel.tick_params(length=0)
            panel.grid(False)
    (usual, idea), (usual_rate, idea_rate) = axes
    for panel, x, word in (
        (usual, 175, "train"),
        (usual, 420, "prune"),
        (usual, 760, "train again"),
        (idea, 50, "wide"),
        (idea, 226, "prune"),
        (idea, 675, "recover"),
    ):
        color = RED if word == "prune" else "0.15"
        panel.text(x, 270, word, color=color, ha="center", va="bottom")
    usual.text(1000, 106, "the size you want", ha="right", color="0.35")
    curve = Schedule(knobs(**IDEA | {"round_to": 1, "prune_every": 1}))
    idea.plot(steps, [curve.width(step, "d_ff") for step in steps], "--", color="0.35", lw=1)
    idea.text(390, 200, "a cubic curve, rounded\nup to multiples of 16", color="0.35", va="center")
    usual_rate.text(600, 0.95, "the rate rises again,\nwith a fresh optimizer", va="center")
    idea_rate.text(600, 0.95, "it rises once,\nthe optimizer is kept", va="center")
    for panel in (idea, idea_rate):
        for x in s.window:
            panel.axvline(x, color="0.75", lw=0.8, zorder=0)
    for panel, words in ((usual, "neurons\nper layer"), (usual_rate, "learning\nrate")):
        panel.set_ylabel(words, rotation=0, ha="right", va="center")
    return figure


def leads(rows: list):
    """rows, of studies/results.py: (what is compared, size, tokens, optimizer, pruned at), and what
    came out. IDEA against the small model: means, 95% intervals, and who leads, if 0 is outside."""
    figure, ((tokens, flops),) = open_figure(1, 2, figsize=(8.3, 5.8), sharey=True)
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no line through words
    left = {"transform": tokens.get_yaxis_transform(), "ha": "right", "va": "center"}
    for y, ((size, each, optimizer, _), words) in enumerate(ROWS.items()):
        tokens.text(-0.04, y - 0.12, words, weight="bold", **left)
        small = f"{each} for each of {size} parameters, {optimizer}"
        tokens.text(-0.04, y + 0.16, small, color="0.4", **left)
    for panel, part in ((tokens, "same tokens"), (flops, "same FLOPs")):
        found = {tuple(cells): e for (compared, *cells), e in rows if part in compared}
        for y, row in enumerate(ROWS):
            e, color, verdict = found[row], "0.5", "no clear difference"
            if not e.low < 0 < e.high:
                color, leader = (BLUE, "IDEA") if e.mean > 0 else (ORANGE, "small model")
                size = f"{abs(e.mean):.3f} nats ({100 * math.expm1(abs(e.mean)):.1g}% perplexity)"
                verdict = f"{leader} by {size}"
            panel.hlines(y, e.low, e.high, color=color, lw=3)
            face = "white" if e.low < 0 < e.high else color
            panel.plot(e.mean, y, "o", ms=4, color=color, mfc=face, mew=2)
            panel.text(-0.02, y - 0.32, verdict, color=color, ha="center", va="center", bbox=plain)
        panel.set(xlim=(-0.08, 0.04), ylim=(len(ROWS) - 0.6, -0.6), yticks=[])
        panel.set_xlabel("nats by which IDEA's loss ends lower\n(bar: 95% interval)")
        panel.set_xticks([-0.06, -0.03, 0, 0.03], ["−0.06", "−0.03", "0", "0.03"])
        panel.axvline(0, color="0.3", lw=1, zorder=0)
        panel.set_title(f"S{part[1:]}", fontsize=12, fontweight="bold", pad=22)
        panel.text(0.002, -0.75, "IDEA better →", color=BLUE, va="center")
        panel.text(-0.002, -0.75, "← small model better", color=ORANGE, ha="right", va="center")
        panel.spines["left"].set_visible(False)
        panel.grid(visible=False, axis="y")
    return figure


def forest(rows: list):
    """All rows, with their settings (faint dots), and of their pairs how many are above 0."""
    figure, axes = open_figure(1, 1, figsize=(7, 6.5))
    panel, labels = axes[0, 0], []
    for (compared, *cells), e in rows:
        if compared not in labels:
            labels.append(compared)
        y, color = len(labels), COLORS[cells[2]]
        labels.append(", ".join(cells))
        panel.text(1.02, y, e.pairs, transform=panel.get_yaxis_transform(), va="center")
        panel.hlines(y, e.low, e.high, color=color, lw=2)
        panel.plot(e.mean, y, "o", ms=4, color=color)
        means = [mean(d) for d in e.tests]
        panel.plot(means, [y + 0.3] * len(means), "o", ms=4, color=color, alpha=0.4, mew=0)
    panel.set_yticks(range(len(labels)), labels)
    for label in panel.get_yticklabels():
        if "against" in label.get_text():
            label.set_fontweight("bold")
    panel.axvline(0, color="0.3", lw=1)
    panel.set(
        ylim=(len(labels), -1),
        xlabel="nats by which the first ends lower (bar: 95% interval; faint dots: settings)",
    )
    panel.set_title(
        "final parameters, tokens for each, optimizer, pruned at", loc="right", x=0, fontsize=9
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
