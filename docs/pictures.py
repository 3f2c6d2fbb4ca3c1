"""Draw the README's pictures: python -m docs.pictures

method.png comes from schedule.py, results.png and all losses from studies/runs.csv.
It needs requirements-extra.txt.
"""

import sys
from pathlib import Path
from statistics import mean

from data.command import command
from schedule import Schedule, knobs
from studies.results import (
    LONG_WARM_UP,
    SHORT_WARM_UP,
    Arms,
    mean_loss,
    read,
    rising,
)
from tools.plot import BLUE, GREY, RED, open_figure

ORANGE = "#c85200"  # readers who cannot tell red from green see it apart from BLUE
FOLDER = Path(__file__).parent
SIZE = (7, 3.6)  # inches
TITLE = {"size": 11.5, "weight": "bold"}

# configs/idea.py in 1,000 steps, with the learning rate as a share of its peak
STEPS = range(1, 1001)
TARGET = 96
IDEA = {
    "d_ff": 256,
    "d_ff_target": TARGET,
    "round_to": 16,
    "prune_every": 25,
    "max_steps": 1000,
    "warmup_steps": 25,
    "learning_rate": 1.0,
    "min_lr_fraction": 0.01,
}
USUAL = IDEA | {
    "prune_schedule": "oneshot",
    "prune_start": 0.1,
    "lr_restart": True,
}
SMALL = IDEA | {"d_ff": TARGET}


def draw_method(arms: Arms):
    """Width and learning rate of three ways to one size, with their losses."""
    shape = {"height_ratios": (1.35, 1), "sharex": "col", "sharey": "row"}
    figure, axes = open_figure(2, 3, figsize=SIZE, **shape)
    (usual, idea, small), rates = axes

    usual.set_title("Usual: two runs", TITLE, loc="left")
    idea.set_title("IDEA Prune: one run", TITLE, loc="left")
    small.set_title("Small from the start", TITLE, loc="left")
    draw_schedule(axes[:, 0], USUAL, GREY)
    draw_schedule(axes[:, 1], IDEA, BLUE)
    draw_schedule(axes[:, 2], SMALL, ORANGE)

    red = {"color": RED, "size": 11}
    usual.text(250, 190, "prune", red)
    idea.text(250, 190, "prune", red)
    write_loss(usual, arms["naive"], "0.15")
    write_loss(idea, arms["idea"], BLUE)
    write_loss(small, arms["scratch"], "0.15")
    right = {"ha": "right", "size": 11}
    rates[0].text(1000, 0.97, "a restart", right)
    rates[1].text(1000, 0.97, "one cosine", right)
    rates[2].text(1000, 0.97, "one cosine", right)

    beside = {"rotation": 0, "ha": "right", "va": "center"}
    usual.set_ylabel("neurons\nper layer", size=10, **beside)
    rates[0].set_ylabel("learning\nrate", size=10, **beside)
    return figure


def write_loss(panel, runs: dict[int, dict], color: str) -> None:
    words = f"loss {mean_loss(runs):.3f}"
    style = {
        "color": color,
        "ha": "right",
        "size": 13,
        "weight": "bold",
    }
    panel.text(990, 38, words, style)


def draw_schedule(panels, settings: dict, color: str) -> None:
    schedule = Schedule(knobs(**settings))
    draw_width(panels[0], schedule, color)
    draw_rate(panels[1], schedule, color)


def draw_width(panel, schedule: Schedule, color: str) -> None:
    if schedule.window:
        widths = [schedule.width(step, "d_ff") for step in STEPS]
    else:
        widths = [TARGET] * len(STEPS)
    area = {"color": color, "alpha": 0.25, "lw": 0}
    panel.fill_between(STEPS, widths, step="post", **area)
    panel.step(STEPS, widths, where="post", color=color, lw=2.5)
    for step in schedule.prune_steps():
        before = schedule.width(step - 1, "d_ff")
        after = schedule.width(step, "d_ff")
        panel.vlines(step, after, before, color=RED, lw=3.5)
    panel.set_ylim(0, 275)
    panel.set_yticks([TARGET, 256])
    plain(panel)


def draw_rate(panel, schedule: Schedule, color: str) -> None:
    rates = [schedule.learning_rate(step) for step in STEPS]
    panel.plot(STEPS, rates, color=color, lw=2.5)
    panel.set_xlim(-10, 1015)
    panel.set_ylim(0, 1.15)
    panel.set_yticks([])
    window = schedule.window or ()
    ends = sorted({*window, 1000})  # 10% once, if the window is one step
    panel.set_xticks(ends, [f"{step // 10}%" for step in ends])
    panel.set_xlabel("training tokens", size=10)
    plain(panel)


def plain(panel) -> None:
    """No grid, no ticks, no line at the left."""
    panel.spines["left"].set_visible(False)
    panel.tick_params(length=0, labelsize=10)
    panel.grid(False)


def draw_results(settings: dict[str, Arms]):
    """IDEA's lead on the same FLOPs over tokens for each final parameter."""
    figure, axes = open_figure(1, 1, figsize=SIZE)
    panel = axes[0, 0]
    muon = rising(settings, "Muon")
    adamw = rising(settings, LONG_WARM_UP)
    adamw[570] = rising(settings, SHORT_WARM_UP)[570]

    # Side by side, because the means nearly coincide
    draw_leads(panel, muon, 0.97, BLUE, "o")
    draw_leads(panel, adamw, 1.03, ORANGE, "D")
    panel.axhline(0, color="0.3", lw=1.2, zorder=0)
    panel.text(25, -0.077, "Muon", TITLE, color=BLUE)
    panel.text(400, -0.022, "AdamW", TITLE, color=ORANGE)
    panel.text(150, 0.045, "↑ IDEA is better", size=11)
    panel.text(150, -0.13, "↓ the small model is better", size=11)

    title = "At equal compute, IDEA about ties from 71 tokens on"
    panel.set_title(title, TITLE, loc="left", size=13)
    panel.set_xscale("log")
    panel.set_xlim(15, 700)
    panel.set_ylim(-0.15, 0.085)
    ticks = sorted({*muon, *adamw})
    panel.set_xticks(ticks, map(str, ticks))
    panel.minorticks_off()
    levels = ("−0.15", "−0.10", "−0.05", "0", "+0.05")
    panel.set_yticks([-0.15, -0.1, -0.05, 0, 0.05], levels)
    panel.tick_params(labelsize=10)
    panel.set_xlabel("training tokens per final parameter", size=11)
    panel.set_ylabel("IDEA's lead, nats per token", size=11)
    dots = "58k parameters. Faint dots are seeds, lines join their means."
    note = "AdamW warms up for 10% of the run, but at 570 tokens for 2.5%."
    figure.supxlabel(f"{dots}\n{note}", size=9, color="0.3", x=0.01, ha="left")
    return figure


def draw_leads(panel, leads: dict, shift: float, color: str, marker: str) -> None:
    """Every seed as a faint dot, and a line through the means."""
    faint = {"color": color, "alpha": 0.35, "mew": 0}
    means = []
    for tokens, differences in leads.items():
        x = tokens * shift
        means.append((x, mean(differences)))
        panel.plot([x] * len(differences), differences, "o", ms=4, **faint)
    panel.plot(*zip(*means), marker=marker, color=color, lw=2)


@command
def main(argv: list[str] | None = None) -> None:
    settings = read()
    figures = {
        "method.png": draw_method(settings["restart/speeches_142"]),
        "results.png": draw_results(settings),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / name, dpi=150)
        print(f"docs/{name}")


if __name__ == "__main__":
    sys.exit(main())
