"""The challenge: who wins by a table of runs, and that its page says so."""

import re
from statistics import mean

import pytest
from helpers import ROOT, refused
from test_compare import arms_of

from run.cost import n_parameters
from tools.arms import load_arms
from tools.challenge import BUDGETS, SMALL, main, verdict
from tools.results import Arms, paired, read_csv, t_test, write

PAGE = (ROOT / "docs" / "challenge.md").read_text()
(PARAMS, BUDGET), (LARGER, MORE) = BUDGETS.items()
AHEAD = [0.010, 0.012, 0.011, 0.009, 0.013]  # the small model's loss minus the entry's, by seed
UNSURE = [0.030, -0.010, 0.011, -0.009, 0.013]


def made_up(leads=AHEAD, entry=None, small=None) -> Arms:
    """As of a runs.csv. entry, small: columns with other values."""
    seeds, lab = range(1, len(leads) + 1), {"params": PARAMS, "flops": BUDGET}
    arms = arms_of({"entry": dict.fromkeys(seeds, 3.5)}, **lab | (entry or {}))
    theirs = {seed: 3.5 + lead for seed, lead in zip(seeds, leads)}
    return arms | arms_of({SMALL: theirs}, **lab | (small or {}))


def test_an_entry_that_leads_on_five_seeds_wins_at_both_sizes_or_with_fewer_flops():
    default = {"params": LARGER, "flops": MORE}
    for changes in ({}, {"entry": default, "small": default}, {"entry": {"flops": BUDGET // 2}}):
        assert verdict(made_up(**changes)) == (True, "lead +0.0110 nats per token, p = 0.0001")


@pytest.mark.parametrize(
    "arms, why",
    [
        (made_up([-x for x in AHEAD]), "its mean loss is not lower: lead -0.0110 .* p = 0.0001"),
        (made_up(AHEAD[1:]), "entry has the seeds .1, 2, 3, 4., not .1, 2, 3, 4, 5."),
        (made_up([*AHEAD, 0.1]), "entry has the seeds .1, 2, 3, 4, 5, 6., not"),
        (made_up() | {SMALL: {}}, "scratch_flops has the seeds .., not"),
        (made_up(entry={"params": LARGER}), "final parameters are .57504, 250432., not all"),
        (made_up(entry={"params": 9}, small={"params": 9}), "final parameters are .9., not all"),
        (made_up(entry={"flops": BUDGET * 1.01}), "entry spends 101.0% of 3.915e.12 FLOPs"),
        (made_up(small={"flops": BUDGET * 0.9}), "entry spends .* FLOPs, scratch_flops 90.0%"),
    ],
)  # fmt: skip
def test_an_entry_that_breaks_a_rule_does_not_win_and_reads_why(arms, why):
    wins, words = verdict(arms)
    assert not wins and re.match(why, words), words


def test_the_command_says_yes_or_no_and_refuses_what_is_no_table(tmp_path, capsys):
    for leads, code, words in ((AHEAD, 0, "YES: lead"), (UNSURE, 1, "NO: p is not below 0.01: l")):
        write(tmp_path / str(code), made_up(leads))
        assert main([str(tmp_path / str(code))]) == code
        assert capsys.readouterr().out.startswith(words)
    write(tmp_path, made_up(entry={"flops": 0}))
    refused(capsys, main, tmp_path, words="runs.csv: line 2: .* not above 0")


def test_the_budgets_are_those_of_the_small_models_and_the_entry_of_the_page_keeps_one(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    lab = ["configs/lab/scratch_flops.py", str(path)]
    for paths, budget in zip((lab, ["configs/scratch_flops.py"]), BUDGETS.items()):
        for arm in load_arms(paths, ["--data_dir=data/sotu"], SMALL):
            flops = pytest.approx(arm.plan.flops(), rel=0.0005)
            assert (n_parameters(arm.plan.final), flops) == budget


def test_the_records_are_those_of_their_runs():
    lines = [line for line in PAGE.splitlines() if line.startswith("| 20")]
    for line in lines:
        name, folder = re.search(r"\[`\w+ (\w+)`\]\(\.\./(\S+)/table\.md\)", line).groups()
        arms = read_csv(ROOT / folder / "runs.csv")
        ours, theirs = arms[name], arms[SMALL]
        loss, seconds = (mean(row[key] for row in ours.values()) for key in ("val_loss", "seconds"))
        lead, p = -mean(paired(ours, theirs)), t_test(paired(ours, theirs))
        numbers = f"| {loss:.4f} | {lead:+.4f} | {p:.2g} | {seconds:.0f} |"
        assert numbers in line and verdict(arms, name)[0] == (f"{numbers} | " in line), line
    assert len(lines) > 5
