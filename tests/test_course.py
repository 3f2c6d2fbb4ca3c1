"""The README's exercises: each still applies, and is the arm whose result it quotes."""

import csv
import re
import types
from pathlib import Path

import pytest
import torch

from prune import CRITERIA
from run.config import load_config, make_schedule

ROOT = Path(__file__).parent.parent
COURSE = (ROOT / "README.md").read_text().partition("\n## A course\n")[2].partition("\n## ")[0]
ARMS = {
    "Another criterion": "compare/magnitude",
    "Another window": "compare/paper",
    "One shot": "ablations/oneshot_10",
    "A restart": "ablations/restart",
    "Heads": "ablations/heads",
    "Global ranking": "ablations/global",
}
BASE = "configs/compare/idea.py"


def exercises() -> dict[str, tuple[str, list[str], list[str], str]]:
    """Title -> (file, lines that go, lines that come, the text with the result)."""
    found = {}
    for part in re.split(r"^\d\. ", COURSE, flags=re.M)[1:]:
        title = re.match(r"\*\*(.+?)\.?\*\*", part)[1]
        file, change = re.search(r"```diff\n *# (\S+)\n(.*?)```", part, re.S).groups()
        lines = [line.strip() for line in change.strip().splitlines()]
        old = [line[1:].strip() for line in lines if line[0] == "-"]
        new = [line[1:].strip() for line in lines if line[0] == "+"]
        found[title] = file, old, new, part
    return found


def changed(title: str) -> str:
    """The file's text after the exercise: its one line in the place of the old, or at the end."""
    file, old, new, _ = exercises()[title]
    assert len(new) == 1 and len(old) <= 1
    text = (ROOT / file).read_text()
    if not old:
        return text + new[0] + "\n"
    assert text.count(old[0]) == 1, (title, old)
    return text.replace(old[0], new[0])


def module(title: str) -> types.ModuleType:
    """The changed file as a module of its own."""
    made = types.ModuleType("changed")
    exec(changed(title), made.__dict__)
    return made


def test_there_are_six_and_each_is_the_arm_that_it_quotes():
    assert set(exercises()) == set(ARMS)


@pytest.mark.parametrize("title", [t for t in ARMS if exercises().get(t, "?")[0] == BASE])
def test_an_exercise_in_the_config_makes_the_arms_config(title, tmp_path):
    (tmp_path / "exercise.py").write_text(changed(title))
    ours, arm = load_config(str(tmp_path / "exercise.py")), load_config(f"configs/{ARMS[title]}.py")
    different = {key for key, value in vars(ours).items() if value != vars(arm)[key]}
    assert different <= {"out_dir"}


def test_the_criterion_exercise_makes_sensitivity_the_magnitude():
    torch.manual_seed(0)
    weights = [torch.randn(8, 4), torch.randn(4, 8)]
    for w in weights:
        w.grad = torch.randn(w.shape)
    args = weights, (("up", 0), ("down", 1)), 8, None, None
    ours = module("Another criterion").sensitivity(*args)
    assert torch.equal(ours, CRITERIA["magnitude"](*args))
    assert not torch.allclose(ours, CRITERIA["sensitivity"](*args))


def test_the_one_shot_exercise_makes_the_schedule_of_one_shot():
    c, arm = load_config(BASE), load_config("configs/ablations/oneshot_10.py")
    ours = module("One shot").Schedule(**vars(make_schedule(c)))
    theirs = make_schedule(arm)
    widths = [
        [s.width(step, c.d_ff, c.d_ff_target, c.round_to) for step in range(1, c.max_steps + 1)]
        for s in (ours, theirs)
    ]
    assert widths[0] == widths[1] and len(set(widths[0])) == 2


@pytest.mark.parametrize("title", ARMS)
def test_the_quoted_results_are_those_in_the_tables(title):
    folder, arm = ARMS[title].split("/")
    results = {"compare": "main", "ablations": "ablations"}[folder]
    with open(ROOT / "results" / results / "runs.csv") as file:
        loss = {(r["arm"], r["seed"]): float(r["val_loss"]) for r in csv.DictReader(file)}
    quoted = r"Seed\s1\sends\sat\s([\d.]+),\s([+-][\d.]+)\sover\s(\d)\sseeds?"
    first, difference, n = re.search(quoted, exercises()[title][3]).groups()
    assert f"{loss[arm, '1']:.4f}" == first
    differences = [loss[arm, s] - loss["idea", s] for s in map(str, range(1, int(n) + 1))]
    assert f"{sum(differences) / len(differences):+.4f}" == difference
