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
COLORS, EDGE = {"Muon": BLUE, "AdamW": ORANGE, "both": "0.25"}, 0.08  # of results.png
UNCLEAR = "cannot tell", "0.35"
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
    for x, word in ((175, "train"), (365, "prune"), (675, "train again")):
        side, color = ("left", RED) if word == "prune" else ("center", "0.15")
        usual.text(x, 590 - 60, word, color=color, ha=side, va="bottom")
    usual.text(1000, 190, "the size you want", ha="right", color="0.35")
    curve = Schedule(knobs(**IDEA | {"round_to": 1, "prune_every": 1}))
    idea.plot(steps, [curve.width(step, "d_ff") for step in steps], "--", color="0.35", lw=1)
    words = {"color": "0.35", "arrowprops": {"arrowstyle": "->", "color": "0.35"}, "va": "center"}
    idea.annotate(
        "a cubic curve, rounded up\nto a multiple of 16 neurons", (215, 250), (480, 400), **words
    )
    usual_rate.text(560, 0.95, "the rate rises again", va="center")
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


def forest(rows: list, detail: bool = False):
    """rows, of studies/results.py: (what is compared, tokens, optimizer, pruned at), and what came
    out. A panel is a question; both optimizers and similar numbers of tokens share a line.
    detail: also each test, and how many pairs agree."""
    figure, axes = open_figure(2, 2, figsize=(9.6, 5.2), sharex=False, height_ratios=(1, 2.1))
    (cosine, key), (tokens, flops) = axes
    for panel, part, title, one, other in (
        (cosine, "cosine", "Does one cosine beat a restart?", "one cosine", "restart"),
        (tokens, "tokens", "With equal tokens, does IDEA win?", "IDEA", "small model"),
        (flops, "FLOPs", "With equal FLOPs, does IDEA win?", "IDEA", "small model"),
    ):
        lines: dict[str, list] = {}
        for (compared, many, optimizer, at), e in rows:
            if part in compared:
                n = int(re.findall(r"\d+", many)[-1])
                name = "16 to 18" if n < 36 else "36 to 142" if n < 570 else many
                name = f"{name},\npruned at {at}"
                text = "on a dictionary" if "dictionary" in many else "on the speeches"
                lines.setdefault(text if panel is cosine else name, []).append((optimizer, e))
        for y, effects in enumerate(lines.values()):
            draw_line(panel, y, effects, detail)
        panel.set_yticks(range(len(lines)), lines if panel is not flops else [])
        panel.set_xticks([-0.05, 0, 0.05], ["−0.05", "0", "+0.05"])
        panel.set(xlim=(-EDGE, EDGE), ylim=(len(lines) - 0.5, -0.9))
        panel.set_title(title, fontsize=11, fontweight="bold", loc="left")
        panel.text(0.002, -0.7, f"{one} better →", color=GREEN, va="center")
        panel.text(-0.002, -0.7, f"← {other} better", color="0.35", va="center", ha="right")
        panel.axvline(0, color="0.3", lw=1)
        panel.axvspan(0, EDGE, color=GREEN, alpha=0.06, lw=0)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    for panel in (tokens, flops):
        panel.set_xlabel("lead, nats per token")
    tokens.set_ylabel("tokens for each final parameter")
    key.axis("off")
    dot = {"marker": "o", "ms": 8, "mew": 2, "ls": ""}
    for optimizer, color in COLORS.items():
        key.plot([], [], color=color, label=optimizer, **dot)
    key.plot([], [], mec="0.35", mfc="white", label="cannot tell: the line has 0 in it", **dot)
    if detail:
        key.plot([], [], "o", ms=4, color=BLUE, alpha=0.4, label="a test; beside: pairs above 0")
    key.legend(loc="center left", frameon=False, fontsize=10)
    return figure


def draw_line(panel, y: float, effects: list, detail: bool) -> None:
    """effects: an optimizer and what came out with it, one below the other."""
    for i, (optimizer, e) in enumerate(effects):
        at, color = y + 0.4 * (i - (len(effects) - 1) / 2), COLORS[optimizer]
        word, shade = ("yes", GREEN) if e.low > 0 else ("no", RED) if e.high < 0 else UNCLEAR
        words = word + f", {e.pairs}" * detail
        beside = {"transform": panel.get_yaxis_transform(), "va": "center"}
        panel.text(1.02, at, words, color=shade, fontsize=10, **beside)
        for x in map(mean, e.tests if detail and len(e.tests) > 1 else ()):
            panel.plot(x, at + 0.13, "o", ms=4, color=color, alpha=0.4, mew=0)
        panel.hlines(at, e.low, e.high, color=color, lw=2.5)
        fill = "white" if word == UNCLEAR[0] else color
        panel.plot(e.mean, at, "o", ms=8, mew=2, color=fill, mec=color)


def save(figure, path: str) -> None:
    figure.savefig(Path(__file__).parents[1] / path, dpi=130, bbox_inches="tight")
    print(path)


@command
def main(argv: list[str] | None = None) -> None:
    save(method(), "docs/method.png")


if __name__ == "__main__":
    sys.exit(main())
