"""When things happen: rates, widths, phases."""

import math
from dataclasses import replace

import pytest

from configs import Config
from schedule import Schedule, Widths, knobs

CONFIG = Config(
    max_steps=1000,
    learning_rate=4e-3,
    warmup_steps=50,
    prune_start=0.5,
    prune_end=0.75,
    prune_every=10,
    d_ff=512,
    d_ff_target=176,
    n_kv_head=4,
    n_kv_head_target=2,
)
EARLY = {"prune_start": 0.1, "prune_end": 0.35, "prune_every": 20}
NEVER = {"d_ff_target": 0, "n_kv_head_target": 0}
STEPS = range(1, 1001)


def make(**changes) -> Schedule:
    return Schedule(replace(CONFIG, **changes))


def steps_where(condition) -> list[int]:
    return [step for step in STEPS if condition(step)]


# Learning rate


def test_one_cosine_falls_from_the_end_of_the_warmup_to_the_floor():
    schedule = make()
    rates = [schedule.learning_rate(step) for step in STEPS]
    warmup = [4e-3 * step / 50 for step in range(1, 51)]
    assert rates[:50] == pytest.approx(warmup)
    cosine = [(1 + math.cos(math.pi * i / 950)) / 2 for i in range(951)]
    expected = [4e-4 + 3.6e-3 * x for x in cosine]
    assert rates[49:] == pytest.approx(expected, rel=1e-12)


def test_restart_gives_each_stage_its_own_warmup_and_cosine():
    schedule = make(lr_restart=True, prune_schedule="oneshot")
    half = make(max_steps=500)
    rates = [schedule.learning_rate(step) for step in STEPS]
    rates_of_half = [half.learning_rate(step) for step in range(1, 501)]
    assert rates == rates_of_half * 2
    assert steps_where(schedule.restarts) == [501]
    assert steps_where(make().restarts) == []


# Widths


def test_widths_follow_the_cubic_at_each_prune_rounded_up_to_the_grid():
    schedule = make()
    assert {schedule.width(step, "d_ff") for step in range(1, 501)} == {512}
    assert {schedule.width(step, "d_ff") for step in range(751, 1001)} == {176}
    for step in range(501, 751):
        last_prune = (step - 501) // 10 * 10
        exact = 176 + 336 * (1 - last_prune / 250) ** 3
        width = schedule.width(step, "d_ff")
        assert exact <= width < exact + 16
        assert width % 16 == 0


def test_a_width_that_is_on_the_grid_is_not_rounded_up():
    """With floats, this one would be."""
    changes = EARLY | {"max_steps": 600, "prune_every": 50}
    schedule = make(**changes, d_ff=1728, d_ff_target=432)
    assert schedule.width(111, "d_ff") == 816


def test_prunes_are_where_a_width_falls_and_lead_to_every_target():
    """From a width off the grid, by an interval that does not divide the window."""
    schedule = make(d_ff=500, prune_every=7)
    widths = {"d_ff": 500, "n_kv_head": 4}
    for step in STEPS:
        for kind, width in schedule.new_widths(step).items():
            assert width < widths[kind]
            widths[kind] = width
        assert widths == {kind: schedule.width(step, kind) for kind in widths}
    assert widths == {"d_ff": 176, "n_kv_head": 2}
    assert schedule.prune_steps() == steps_where(schedule.new_widths)


def test_nothing_is_pruned_without_a_target():
    schedule = make(**NEVER)
    assert schedule.widths == {}
    assert schedule.prune_steps() == []
    assert schedule.phase(700) == "train"
    assert steps_where(schedule.scoring) == []


def test_the_window_opens_at_prune_start_and_oneshot_closes_it_there():
    schedule = make(**EARLY)
    assert schedule.window == (101, 351)
    assert schedule.prune_steps()[0] == 121
    oneshot = make(**EARLY, prune_schedule="oneshot", n_kv_head_target=0)
    assert oneshot.window == (101, 101)
    assert oneshot.prune_steps() == [101]
    assert oneshot.new_widths(101) == {"d_ff": 176}
    # No other kind has a target
    assert oneshot.widths == {"d_ff": Widths(512, 176, 16)}


COUNTS = (
    "n_head",
    "n_kv_head",
    "n_layer",
    "num_heads",
    "num_attention_heads",
    "num_hidden_layers",
)
SIZES = ("intermediate_size", "n_inner", "n_embd", "num_experts")


@pytest.mark.parametrize("kind", COUNTS + SIZES)
def test_every_kind_has_a_grid_but_numbers_of_heads_and_layers(kind):
    widths = {kind: 64, f"{kind}_target": 24}
    schedule = Schedule(knobs(100, round_to=8, **widths))
    grid = 1 if kind in COUNTS else 8
    assert schedule.widths == {kind: Widths(64, 24, grid)}


# Phases


def test_phases_and_scoring_follow_the_window():
    schedule = make()
    phases = ["enlarged"] * 500 + ["prune"] * 250 + ["recover"] * 250
    assert [schedule.phase(step) for step in STEPS] == phases
    assert steps_where(schedule.scoring) == list(range(501 - 34, 751))


def test_oneshot_scores_until_its_prune_and_has_no_prune_phase():
    oneshot = make(prune_schedule="oneshot")
    assert steps_where(oneshot.scoring) == list(range(501 - 34, 501))
    assert oneshot.phase(500) == "enlarged"
    assert oneshot.phase(501) == "recover"


def test_scoring_starts_at_step_1_if_it_averages_over_more_steps_than_there_are():
    schedule = make(score_beta=0.9999)
    assert steps_where(schedule.scoring) == list(range(1, 751))


# What is refused

WRONG = (  # the last knob is to blame
    {"d_ff_target": 513},
    {"d_ff_target": -16},
    {"prune_end": 0.1},
    {"prune_start": 0.0},
    {"prune_schedule": "one_shot"},
    {"prune_every": 0},
    {"round_to": 0},
    {"max_steps": 3},
    {"max_steps": 0},
    {"learning_rate": math.nan},
    {"learning_rate": -1.0},
    {"min_lr_fraction": -0.1},
    {"score_beta": 1.0},
    {"warmup_steps": -1},
    {"lr_restart": True, "warmup_steps": 100},
    NEVER | {"lr_restart": True},
)


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_knobs_that_make_no_schedule_are_refused_by_name(changes):
    knob = list(changes)[-1]
    with pytest.raises(ValueError, match=f"^{knob}="):
        make(**EARLY | {"warmup_steps": 1} | changes)


def test_a_target_off_the_grid_is_refused():
    off_the_grid = knobs(100, d_ff=10, d_ff_target=5, round_to=16)
    with pytest.raises(ValueError, match="^d_ff_target=5: .* round_to=16$"):
        Schedule(off_the_grid)


def test_a_misspelt_knob_is_refused_because_it_would_do_nothing():
    with pytest.raises(ValueError, match="^d_ff_end: no such knob"):
        knobs(100, d_ff=64, d_ff_target=24, d_ff_end=0.5)
