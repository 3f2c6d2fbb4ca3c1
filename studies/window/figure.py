"""The figure of README.md: python -m studies.window.figure (needs SciPy, matplotlib)"""

import sys

from data import command
from docs.pictures import BLUE, GREEN, ORANGE
from run.config import load_config
from schedule import Schedule
from studies.results import STUDIES, effect
from tools.compare import paired, read_arms, read_csv
from tools.plot import open_figure


class Plateau(Schedule):  # with the change of exercise 7 of docs/course.md
    def warmup_then_cosine(self, step: int, steps: int) -> float:
        peak, floor = self.c.learning_rate, self.c.min_lr_fraction * self.c.learning_rate
        falling = floor + (peak - floor) * min(1, (1 - step / steps) / 0.2)
        return min(falling, peak * step / self.c.warmup_steps)


FOLDER, REFERENCE = STUDIES / "window", "idea_10_35"
ARMS = {REFERENCE: "10-35", "idea_50_75": "50-75", "oneshot_25": "25", "oneshot_50": "50"}
ARMS |= {"oneshot_625": "62.5", "oneshot_75": "75"}  # where each prunes, % of the run
RUNS = {"when": ("AdamW", ORANGE, Schedule), "plateau": ("AdamW, plateau", GREEN, Plateau)}
RUNS |= {"muon": ("Muon", BLUE, Schedule)}
LEFT = "Rate left: curves come close", "Steps left: they part", "Rate left after the last prune"


def shares(arm: str, kind: type[Schedule]) -> tuple[float, float, float]:
    """What the arm's prunes leave of the run, as in LEFT. By neuron: a mean over those that go."""
    schedule = kind(load_config(*read_arms("studies/window/arms.py")[1][arm]))
    steps, last, width = schedule.prune_steps(), schedule.max_steps, schedule.width
    gone = [width(step - 1, "d_ff") - width(step, "d_ff") for step in steps]
    rates = [schedule.rate_share(step, last) for step in steps]
    both = rates, [1 - (step - 1) / last for step in steps]
    return *(sum(a * b for a, b in zip(x, gone)) / sum(gone) for x in both), rates[-1]


@command
def main(argv: list[str] | None = None) -> None:
    figure, axes = open_figure(1, 3, figsize=(11, 4.6), sharey=True)
    for name, (label, color, kind) in RUNS.items():
        runs = read_csv(FOLDER / name / "runs.csv")[""]
        found = {a: effect([paired(runs[a], runs[REFERENCE])]) for a in runs if a != REFERENCE}
        halves = {a: (e.mean, e.high - e.mean) for a, e in found.items()} | {REFERENCE: (0, 0)}
        left = {a: shares(a, kind) for a in ARMS if a in halves}
        for i, (panel, title) in enumerate(zip(axes[0], LEFT)):
            x, y, half, arms = zip(*sorted((left[a][i], *halves[a], a) for a in left))
            panel.errorbar(x, y, half, lw=1, color=color, label=label)
            panel.axhline(found["scratch"].mean, color=color, lw=1, ls=":")
            for arm, *point in zip(arms, x, y):
                mark, at = ("s", (-9, -14)) if "idea" in arm else ("o", (4, 4))
                panel.plot(*point, mark, ms=5, color=color)
                words = ARMS[arm] if name == "when" else ""
                panel.annotate(words, point, at, color=color, textcoords="offset points")
            panel.set(xscale="log", title=title, xlabel="share of the run")
            panel.set_xticks([0.03, 0.1, 0.3, 1], ["3%", "10%", "30%", "100%"])
            panel.minorticks_off()
    axes[0, 0].set_ylabel("loss minus that of a window from 10 to 35%, nats")
    axes[0, 2].legend()
    figure.savefig(FOLDER / "when.png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
