"""The figure of README.md, "When": python -m studies.window.figure (needs SciPy, matplotlib)"""

import sys
from itertools import combinations

from docs.pictures import BLUE, ORANGE
from run.config import load_config
from schedule import Schedule
from studies.results import STUDIES, effect
from tools import command
from tools.compare import read_arms
from tools.figures import open_figure
from tools.results import paired, read_csv

FOLDER = STUDIES / "window"
ARMS = {"idea_10_35": "10-35", "oneshot_25": "25", "oneshot_50": "50", "idea_50_75": "50-75"}
ARMS |= {"oneshot_625": "62.5", "oneshot_75": "75"}  # where each prunes, % of the run
RUNS = {"when": ("AdamW", ORANGE), "muon": ("Muon", BLUE)}
TITLES = "averaged over the neurons that go", "after the last prune"


def shares(arm: str) -> tuple[float, float]:
    """What prunes leave of the learning rate summed over the run: averaged over the neurons that
    go, and after the last prune."""
    schedule = Schedule(load_config(*read_arms("studies/window/arms.py")[arm]))
    steps, width = schedule.prune_steps(), schedule.width
    left = [schedule.rate_share(step, schedule.max_steps) for step in steps]
    gone = [width(step - 1, "d_ff") - width(step, "d_ff") for step in steps]
    return sum(a * b for a, b in zip(left, gone)) / sum(gone), left[-1]


@command
def main(argv: list[str] | None = None) -> None:
    figure, axes = open_figure(1, 2, figsize=(8, 3.4), sharey=True)
    left = {arm: shares(arm) for arm in ARMS}
    for name, (label, color) in RUNS.items():
        if not (path := FOLDER / name / "runs.csv").exists():
            print(f"{path}: not there yet")
            continue
        runs = read_csv(path)
        found = {a: effect([paired(runs[a], runs["scratch"])]) for a in ARMS if a in runs}
        for panel, title, i in zip(axes[0], TITLES, (0, 1)):
            points = sorted((left[a][i], e.mean, a) for a, e in found.items())
            x, y, arms = zip(*points)
            against = sum(b >= a for a, b in combinations(y, 2))
            print(f"{label}, {title}: {against} of {len(y) * (len(y) - 1) // 2} pairs of arms")
            bars = [[e.mean - e.low, e.high - e.mean] for e in (found[a] for a in arms)]
            panel.errorbar(x, y, [*zip(*bars)], fmt="o-", ms=5, lw=1, color=color, label=label)
            for arm, *point in zip(arms, x, y):
                place = (4, -12 if arm.startswith("idea") else 4)
                panel.annotate(ARMS[arm], point, xytext=place, textcoords="offset points")
    for panel, title in zip(axes[0], TITLES):
        panel.axhline(0, color="0.3", lw=1)
        panel.set(xscale="log", xlabel=f"learning rate left, {title}")
        panel.set_xticks([0.03, 0.1, 0.3, 1], ["3%", "10%", "30%", "100%"], minor=False)
        panel.minorticks_off()
    axes[0, 0].set_ylabel("loss minus the small model's, nats")
    axes[0, 1].legend()
    figure.savefig(FOLDER / "when.png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
