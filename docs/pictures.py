"""Pictures of the README. method.png comes from schedule.py alone: python -m docs.pictures

`python -m studies.results` draws results.png. Both need matplotlib.
"""

import sys
from pathlib import Path

from data.command import command
from schedule import Schedule, knobs
from tools.plot import BLUE, GREY, RED, open_figure

ORANGE = "#c85200"  # beside BLUE, for who cannot tell red from green
# configs/idea.py in 1,000 steps, with the rate as a share of its peak; one prune and a restart
# instead; and small from the start
IDEA = {"d_ff": 256, "d_ff_target": 96, "round_to": 16, "prune_every": 25, "learning_rate": 1.0}
IDEA |= {"warmup_steps": 25, "min_lr_fraction": 0.01, "max_steps": 1000}
USUAL = IDEA | {"prune_schedule": "oneshot", "prune_start": 0.1, "lr_restart": True}
SMALL = IDEA | {"d_ff": 96}
RUNS = (  # losses: means of restart/speeches_142 in studies/runs.csv; below, of `enlarged`
    ("Usual: two runs", USUAL, GREY, "3.422"),
    ("IDEA Prune: one run", IDEA, BLUE, "3.414"),
    ("Small from the start", SMALL, ORANGE, "3.428"),
)
# In results.png: the colour of a size; words at some points (tokens, size, optimizer, and where the
# window opens), and how far from them, in points
COLORS = {"58k": BLUE, "70k": "#3d9fd6", "250k": ORANGE, "263k": ORANGE, "467k": "0.15"}
HEADLINE = "On the same FLOPs, IDEA with Muon catches up at 71 tokens for each parameter"
CAPTION = "Circle: Muon. Diamond: AdamW. Hollow: pruned late, from 25 or 50% of the run on.\n"
CAPTION += "Bar: 95% interval. Faint dot: a pair of seeds. "
CAPTION += "Points of as many tokens stand side by side; {} pairs lie lower."
BOTTOM, TOP = -0.08, 0.06
WORDS = {
    "same tokens": {
        "18 58k Muon 10": ("58k", 7, 4),
        "65 250k Muon 10": ("250k", -7, 10),
        "36 467k Muon 10": ("467k", -7, 10),
        "59 70k Muon 10": ("70k, of\nanother shape", 10, 6),
        "142 58k AdamW 10": ("58k, AdamW", -2, -27),
        "570 58k AdamW 10": ("58k,\nAdamW", -7, 18),
        "570 58k Muon 10": ("58k", -6, -8),
        "570 58k AdamW 50": ("58k, AdamW,\npruned late", -10, -40),
        "570 58k Muon 50": ("58k,\npruned\nlate", 9, 16),
        "36 263k AdamW 10": ("263k, AdamW: {}", 9, 8),
        "36 263k AdamW 10_low": ("263k, AdamW,\nat a lower rate", 10, 8),
    },
    "same FLOPs": {
        "18 58k Muon 10": ("58k", 8, -6),
        "36 263k Muon 10": ("263k", 8, -10),
        "36 467k Muon 10": ("467k", -8, 6),
        "59 70k Muon 10": ("70k, of\nanother shape", 10, 8),
        "65 250k Muon 10": ("250k", -8, 8),
        "142 58k Muon 10": ("58k", 8, -3),
        "142 58k AdamW 10": ("58k, AdamW", 3, -25),
        "570 58k AdamW 10": ("58k,\nAdamW", -7, 18),
        "570 58k AdamW 50": ("58k, AdamW,\npruned late", -10, -12),
        "569 250k Muon 25": ("250k, late", -6, -30),
        "1540 58k Muon 25": ("58k,\nlate", -8, -14),
        "36 263k AdamW 10": ("263k, AdamW: {}", 17, 22),
        "36 263k AdamW 10_low": ("at a lower rate: {}", 9, 8),
    },
}


def method():
    """Width and learning rate over tokens: the usual pipeline, IDEA Prune and the small model."""
    size = {"figsize": (9.2, 3.9), "height_ratios": (1.3, 1)}
    figure, axes = open_figure(2, 3, sharex="col", sharey="row", **size)
    steps = range(1, 1001)
    for (top, low), (title, settings, color, end) in zip(axes.T, RUNS):
        s = Schedule(knobs(**settings))
        widths = [s.width(step, "d_ff") if s.window else 96 for step in steps]
        top.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=16)
        top.fill_between(steps, widths, step="post", color=color, alpha=0.25, lw=0)
        top.plot(steps, widths, drawstyle="steps-post", color=color, lw=2)
        for step in s.prune_steps():
            top.vlines(step, s.width(step, "d_ff"), s.width(step - 1, "d_ff"), color=RED, lw=3)
        top.axhline(96, color="0.35", lw=1, ls=":")
        top.set(ylim=(0, 280), yticks=[96, 256])
        top.text(1000, 40, f"loss {end}", ha="right", va="center", weight="bold", size=11)
        low.plot(steps, [s.learning_rate(step) for step in steps], color=color, lw=2)
        low.set(ylim=(0, 1.15), yticks=[], xlim=(-10, 1040), xlabel="training tokens →")
        ends = sorted({*(s.window or ()), 1001})  # the first steps of what follows
        low.set_xticks(ends, [f"{step // 10}%" for step in ends])
        for panel in (top, low):
            panel.spines["left"].set_visible(False)
            panel.tick_params(length=0)
            panel.grid(False)
            for x in s.window or ():
                panel.axvline(x, color="0.75", lw=0.8, zorder=0)
    (usual, idea, small), (usual_rate, idea_rate, small_rate) = axes
    for panel, x, word in (
        (usual, 40, "wide"),
        (usual, 190, "prune"),
        (usual, 640, "train again"),
        (idea, 40, "wide"),
        (idea, 226, "prune"),
        (idea, 675, "recover"),
        (small, 500, "train"),
    ):
        color = RED if word == "prune" else "0.15"
        panel.text(x, 268, word, color=color, ha="center", va="bottom")
    usual.text(1000, 106, "the size you want", ha="right", color="0.35")
    curve = Schedule(knobs(**IDEA | {"round_to": 1, "prune_every": 1}))
    idea.plot(steps, [curve.width(step, "d_ff") for step in steps], "--", color="0.35", lw=1)
    idea.text(380, 180, "a cubic curve, rounded\nup to multiples of 16", color="0.35", va="center")
    idea.hlines(256, 150, 1000, color="0.35", lw=1, ls=":")
    idea.text(1000, 250, "never pruned: 3.311", ha="right", va="top", color="0.35")
    for panel, words in (
        (usual_rate, "it rises again,\nwith a fresh\noptimizer"),
        (idea_rate, "it rises once,\nthe optimizer is kept"),
        (small_rate, "it rises once"),
    ):
        panel.text(1000, 1.14, words, va="top", ha="right")
    for panel, words in ((usual, "neurons\nper layer"), (usual_rate, "learning\nrate")):
        panel.set_ylabel(words, rotation=0, ha="right", va="center")
    return figure


def law(points: dict):
    """points, of studies/results.py: IDEA's lead over tokens for each parameter, and each pair."""
    figure, (panels,) = open_figure(1, 2, figsize=(8.6, 5.8), sharey=True)
    figure.suptitle(HEADLINE, fontsize=12.5, fontweight="bold", x=0.01, ha="left")
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # no line through words
    near = {"textcoords": "offset points", "va": "center", "fontsize": 9, "zorder": 4}
    for panel, (part, words) in zip(panels, WORDS.items()):
        here = {key: e for key, e in points.items() if key.part == part}
        curves: dict[str, list] = {}  # with Muon, pruned early, of a size
        for key, e in here.items():
            beside = [k for k in here if abs(k.tokens / key.tokens - 1) < 0.01]  # as many tokens
            beside.sort(key=lambda k: (k.window, k.optimizer, -int(k.size[:-1]), k.low))
            x = key.tokens * 1.15 ** (beside.index(key) - (len(beside) - 1) / 2)
            y, color, pairs = e.mean, COLORS[key.size], sum(e.tests, [])
            late, shape = key.window != "10-35", {"Muon": "o", "AdamW": "D"}[key.optimizer]
            if not late and key.optimizer == "Muon":
                curves.setdefault(color, []).append((x, y))
            look = {"color": color, "mfc": "white" if late else color, "mew": 1.6}
            panel.plot([x] * len(pairs), pairs, "o", ms=2.8, color=color, alpha=0.35, mew=0)
            panel.vlines(x, e.low, e.high, color=color, lw=1.5 if len(pairs) > 3 else 0.7)
            panel.plot(x, y, shape, ms=6.5, zorder=3, **look)
            name = f"{key.tokens} {key.size} {key.optimizer} {key.window[:2]}{'_low' * key.low}"
            text, *away = words.get(name, ("", 1, 1))
            arrow = None
            if y < BOTTOM:
                text, y = text.format(f"{y:.3f}".replace("-", "−")), BOTTOM
                arrow = {"arrowstyle": "->", "color": color, "lw": 1.6}
                panel.annotate("", (x, y), (0, 16), textcoords="offset points", arrowprops=arrow)
            side = "left" if away[0] > 0 else "right"
            panel.annotate(text, (x, y), away, color=color, ha=side, bbox=plain, **near)
        for color, curve in curves.items():
            panel.plot(*zip(*curve), color=color, lw=1, alpha=0.6, zorder=1)
        panel.set(xscale="log", xlim=(11, 2300), ylim=(BOTTOM, TOP))
        panel.set_xticks([18, 36, 71, 142, 570, 1540], ["18", "36", "71", "142", "570", "1,540"])
        panel.minorticks_off()
        panel.set_xlabel("training tokens for each final parameter")
        panel.axhline(0, color="0.3", lw=1, zorder=0)
        panel.set_title(f"On the {part}", fontsize=11)
        for y, text in ((0.95, "IDEA better ↑"), (0.11, "small model better ↓")):
            panel.text(0.98, y, text, transform=panel.transAxes, ha="right", bbox=plain)
    panels[0].set_ylabel("nats by which IDEA ends lower (0.01: 1% of perplexity)")
    below = sum(x < BOTTOM for e in points.values() for x in sum(e.tests, []))
    figure.text(0.01, -0.02, CAPTION.format(below), fontsize=9, color="0.25", va="top")
    return figure


def save(figure, path: str) -> None:
    figure.savefig(Path(__file__).parents[1] / path, dpi=130, bbox_inches="tight")
    print(path)


@command
def main(argv: list[str] | None = None) -> None:
    save(method(), "docs/method.png")


if __name__ == "__main__":
    sys.exit(main())
