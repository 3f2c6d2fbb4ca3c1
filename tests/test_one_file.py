"""docs/one_file.py on the command line, and beside the four files."""

import copy
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from docs import one_file
from model import SLICES
from prune import UnitGroup, unit_scores
from schedule import Schedule

WRONG = (
    "--criterio=no",
    "--criterion=no",
    "--max_steps=ten",
    "--max_steps",
    "--d_ff_target=300",
    "--round_to=0",
    "--prune_end=0.0",
    "max_steps=10",
)


@pytest.mark.parametrize("knob", WRONG)
def test_a_knob_that_makes_no_run_is_refused(knob, refused):
    refused(f"error: {knob}: ", knob, main=one_file.main)


def test_help_lists_every_knob_with_its_default(capsys):
    assert one_file.main(["--help"]) == 0
    text = capsys.readouterr().out
    for field in fields(one_file.Config):
        assert f" {field.name}: {field.type.__name__} = " in text


def settings(**changes) -> SimpleNamespace:
    """The knobs of one_file.py, and those that only the schedule has."""
    knobs = vars(one_file.Config())
    others = {"prune_schedule": "cubic", "lr_restart": False, "min_lr_fraction": 0.0}
    return SimpleNamespace(**(knobs | others | changes))


SMALL = {"max_steps": 24, "warmup_steps": 4, "prune_every": 2}


@pytest.mark.parametrize("changes", [{}, SMALL, {"prune_start": 0.3, "d_ff": 250}])
def test_width_and_learning_rate_are_those_of_the_schedule_at_all_steps(changes):
    config = settings(**changes)
    schedule = Schedule(config)
    for step in range(1, config.max_steps + 1):
        assert one_file.width(step, config) == schedule.width(step, "d_ff")
        rate = schedule.learning_rate(step)
        assert one_file.learning_rate(step, config) == pytest.approx(rate)


def test_scores_are_those_of_prune_and_a_cut_model_computes_like_a_masked_one():
    torch.manual_seed(1)
    config = settings(batch_size=2, context_length=8)
    model = one_file.GPT(config)
    batch = torch.randint(256, (2, 3, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(*batch).backward()
    optimizer.step()
    masked, masked_optimizer = copy.deepcopy((model, optimizer))
    keep = torch.arange(1, 256, 3)
    removed = torch.tensor([i for i in range(256) if i % 3 != 1])
    for i, block in enumerate(model.blocks):
        slices = []
        for where in SLICES["d_ff"]:
            slices.append(
                where._replace(name=where.name.replace("ffn.", f"blocks.{i}."))
            )
        group = UnitGroup(f"blocks.{i}.d_ff", "d_ff", 256, tuple(slices))
        scores = unit_scores(model, group, "sensitivity").detach()
        torch.testing.assert_close(one_file.unit_scores(block, "sensitivity"), scores)
        one_file.slice_group(block, optimizer, keep)
        for name, dim, _ in slices:
            small = model.get_parameter(name)
            large = masked.get_parameter(name)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = masked_optimizer.state[large][key].index_select(dim, keep)
                assert torch.equal(optimizer.state[small][key], moment)
            large.data.index_fill_(dim, removed, 0.0)
    torch.testing.assert_close(model(*batch), masked(*batch))
