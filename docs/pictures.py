"""The README's two pictures. method.png comes from schedule.py alone: python -m docs.pictures

`python -m studies.results` draws results.png, from the runs of the studies. Needs matplotlib.
"""

import re
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
        low.set(ylim=(0, 1.15), yticks=[], xlim=(-10, 1040), xticks=[], xlabel="training tokens →")
        for panel in (top, low):
            panel.spines["left"].set_visible(False)
            panel.tick_params(length=0)
            panel.grid(False)
    (usual, idea), (usual_rate, idea_rate) = axes
    usual.text(365, 350, "prune", color=RED)
    usual.text(1000, 190, "the size you want", ha="right", color="0.35")
    idea_rate.text(226, 0.4, "we prune at\n10 to 35%", color="0.35", ha="center", va="center")
    words = {
        "xytext": (480, 400),
        "color": "0.35",
        "arrowprops": {"arrowstyle": "->", "color": "0.35"},
    }
    idea.annotate("smaller and smaller cuts,\nin multiples of 16 neurons", (235, 290), **words)
    usual_rate.text(560, 0.95, "the rate rises again", va="center")
    for x, word, side in (
        (90, "enlarge", "right"),
        (226, "prune", "center"),
        (675, "recover", "center"),
    ):
        idea.text(x, 545, word, ha=side, color=RED if word == "prune" else "0.15")
    for panel in (idea, idea_rate):
        for x in s.window:
            panel.axvline(x, color="0.75", lw=0.8, zorder=0)
    for panel, words in ((usual, "neurons\nper layer"), (usual_rate, "learning\nrate")):
        panel.set_ylabel(words, rotation=0, ha="right", va="center")
    return figure


def forest(rows: list):
    """The rows of studies/results.py: dots are means, bars 95% intervals, faint dots single tests;
    and in how many pairs of runs the first is better. Hollow: 0 is in the interval."""
    figure, axes = open_figure(1, 1, figsize=(5.4, 6), constrained_layout=False)
    panel, edge, columns = axes[0, 0], 0.06, (-0.79, -0.45, -0.28, 1.05, 1.28)
    at = {"transform": panel.get_yaxis_transform(), "va": "center", "fontsize": 9}
    heads = "tokens for each\nfinal parameter", "optimizer", "pruned at"
    heads += "seeds where\nit won", "what we\ncan say"
    y, compared = 0.0, None
    for x, head in zip(columns, heads):
        panel.text(x, y, head, color="0.35", **at)
    for (words, *cells), e in rows:
        if words != compared:
            compared, y = words, y - 1.5
            panel.text(-0.82, y, compared, fontweight="bold", **at)
            first, second = re.match(r"(.*), against (.*?)( after|:)", compared).group(1, 2)
            panel.text(0.003, y, f"{first} is better →", color=GREEN, va="center")
            panel.text(-0.003, y, f"← {second} is better", color="0.35", va="center", ha="right")
        y -= 1
        color = {"Muon": BLUE, "AdamW": ORANGE}[cells[1]]
        told, several = e.low > 0 or e.high < 0, len(e.tests) > 1
        verdict = ("better", GREEN) if e.low > 0 else ("worse", RED)
        word, shade = verdict if told else ("cannot tell", "0.35")
        if len(e.tests) > 2 and e.heaviest > 0.8:
            word += f" in 1 of {len(e.tests)}"
        for x, cell in zip(columns, (*cells, e.pairs, word)):
            panel.text(x, y, cell, color={cells[1]: color, word: shade}.get(cell, "0.15"), **at)
        for x in map(mean, e.tests if several else ()):
            panel.plot(x, y - 0.3, "o", ms=4, color=color, alpha=0.4, mew=0)
        panel.plot([max(e.low, -edge), min(e.high, edge)], [y, y], color=color, lw=2)
        for x, mark, beyond in ((-edge, "<", e.low < -edge), (edge, ">", e.high > edge)):
            if beyond:
                panel.plot(x, y, mark, color=color, clip_on=False)
        panel.plot(e.mean, y, "o", ms=7, mew=2, color=color if told else "white", mec=color)
        note = f"{len(e.tests)} tests, far apart" if several and not told else ""
        panel.text(edge, y - 0.35, note, color="0.35", fontsize=8, va="center", ha="right")
    panel.axvline(0, color="0.3", lw=1)
    panel.axvspan(0, edge, color=GREEN, alpha=0.06, lw=0)
    panel.set(xlim=(-edge, edge), ylim=(y - 0.7, 0.7), yticks=[])
    panel.set_xlabel(
        "by how much the loss is lower (nats per token). Large dots are means over tests\n"
        "(over seeds, if there is one), lines 95% intervals. We cannot tell where one crosses 0.\n"
        "Small dots are tests: one text, shape and number of tokens, over some seeds."
    )
    panel.xaxis.set_major_formatter("{x:+.2f}")
    panel.spines["left"].set_visible(False)
    return figure


def save(figure, name: str) -> None:
    to = Path(__file__).parent / name
    figure.savefig(to, dpi=130, bbox_inches="tight")
    print(to)


@command
def main(argv: list[str] | None = None) -> None:
    save(method(), "method.png")


if __name__ == "__main__":
    sys.exit(main())
