"""Knobs: what could not be a run is refused in one line; a plan is what its knobs say."""

import sys
from dataclasses import fields

import pytest

from run.config import Config, load_config
from run.cost import Plan, flops_per_token
from train import main

BAD = [  # knobs, and the key and what else its line names
    ("--d_ff_targt=3", "unknown key 'd_ff_targt' = 3; the nearest is 'd_ff_target'"),
    ("--criterion=taylor", "criterion='taylor'"),
    ("--prune_schedule=line", "prune_schedule='line'"),
    ("--d_ff_target=170", "d_ff_target=170: must be a multiple of round_to=16"),
    ("--max_steps=ten", "max_steps='ten'"),
    ("--context_length=1000000", "context_length"),
    ("--data_dir=data/none", "data/none: no such folder; make it"),
    ("--init_from=configs/idea.py", "idea.py: damaged, or not a checkpoint"),
    ("--shorter=0", "shorter=0"),
    ("--init_from=out/none --stop_after=9999", "stop_after=9999"),
    ("--learning_rate=-1", "learning_rate=-1.0"),
    ("--out_dir=configs/idea.py", "out_dir=configs/idea.py"),
]


def load(name: str, *overrides: str) -> Config:
    return load_config(f"configs/{name}.py", list(overrides))


def test_plan_counts_the_flops_of_every_step():
    c = load("idea_attention", "--n_layer_target=1", "--d_model_target=16", "--round_to=8")
    plan, by_step = Plan(c, 1024), 0
    for step in range(1, c.max_steps + 1):
        by_step += c.batch_size * c.context_length * flops_per_token(plan.shape(step))
        assert step % 50 or plan.flops(step) == by_step
    assert plan.flops() == by_step


def test_a_shorter_run_is_shorter_in_all_that_counts_its_steps():
    c = load("idea", "--shorter=8", "--max_steps=2000", "--stop_after=90", "--log_every=3")
    assert (c.max_steps, c.warmup_steps, c.prune_every) == (250, 100 // 8, 100 // 8)
    assert (c.eval_every, c.save_every, c.log_every, c.stop_after) == (500 // 8, 1000 // 8, 3, 90)
    assert load("idea", "--shorter=8").log_every == 500 // 20  # some 20 lines
    assert load("idea", "--shorter=1") == load("idea")
    assert load("idea", "--shorter=2", "--warmup_steps=0").warmup_steps == 0


@pytest.mark.parametrize("overrides, words", BAD)
def test_a_bad_knob_ends_in_one_line_that_names_it(overrides, words, tmp_path, refused):
    out = tmp_path / "run"
    refused(words, "configs/idea.py", f"--out_dir={out}", "--device=cpu", *overrides.split())
    assert {path.name for path in out.glob("*")} <= {"lock"}  # no run is there


def test_among_ranks_a_bad_knob_is_said_once_on_each_machine(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "9")
    for local_rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["configs/idea.py"]) == 2
        assert capsys.readouterr().err.count("rank 9: error: batch_size=16") == lines


def test_help_lists_every_knob_with_its_default(capsys, monkeypatch):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f" {f.name}: {f.type.__name__} = " in text for f in fields(Config))
    monkeypatch.setattr("sys.stderr", sys.stdout)  # as in a terminal
    assert main([]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("error: no CONFIG")
