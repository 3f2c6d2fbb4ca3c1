"""When things happen: rates, widths, phases."""

import math
from dataclasses import replace

import pytest

from run.config import Config
from schedule import Schedule, Widths, knobs

STEPS = {"max_steps": 1000, "learning_rate": 4e-3, "warmup_steps": 50, "prune_every": 10}
STEPS |= {"prune_start": 0.5, "prune_end": 0.75}
C = Config(**STEPS, d_ff=512, d_ff_target=176, n_kv_head=4, n_kv_head_target=2)
NEVER = {"d_ff_target": 0, "n_kv_head_target": 0}


def make(**changes) -> Schedule:
    return Schedule(replace(C, **changes))


def test_one_cosine_falls_from_the_end_of_the_warmup_to_the_floor():
    rates = list(map(make().learning_rate, range(1, 1001)))
    assert rates[:50] == pytest.approx([4e-3 * step / 50 for step in range(1, 51)])
    cosine = [(1 + math.cos(math.pi * i / 950)) / 2 for i in range(951)]
    assert rates[49:] == pytest.approx([4e-4 + 3.6e-3 * x for x in cosine], rel=1e-12)


def test_restart_gives_each_stage_its_own_warmup_and_cosine():
    s = make(lr_restart=True, prune_schedule="oneshot")
    alone = list(map(make(max_steps=500).learning_rate, range(1, 501)))
    assert list(map(s.learning_rate, range(1, 1001))) == alone * 2
    assert [step for step in range(1, 1001) if s.restarts(step)] == [501]
    assert not any(map(make().restarts, range(1, 1001)))


def test_widths_follow_the_cubic_at_each_prune_rounded_up_to_the_grid():
    s = make()
    widths = [s.width(step, "d_ff") for step in range(1, 1001)]
    assert set(widths[:500]) == {512} and set(widths[750:]) == {176}
    for step in range(501, 751):
        exact = 176 + 336 * (1 - (step - 501) // 10 * 10 / 250) ** 3
        assert exact <= widths[step - 1] < exact + 16 and widths[step - 1] % 16 == 0
    s = make(
        max_steps=600, prune_every=50, prune_start=0.1, prune_end=0.35, d_ff=1728, d_ff_target=432
    )
    assert s.width(111, "d_ff") == 816  # on the grid, above which floats land


def test_prunes_are_where_a_width_falls_and_lead_to_every_target():
    """From a width off the grid, by an interval that does not divide the window."""
    s, widths = make(d_ff=500, prune_every=7), {"d_ff": 500, "n_kv_head": 4}
    for step in range(1, 1001):
        for kind, width in s.new_widths(step).items():
            assert width < widths[kind]
            widths[kind] = width
        assert widths == {kind: s.width(step, kind) for kind in widths}
    assert widths == {"d_ff": 176, "n_kv_head": 2}
    assert s.prune_steps() == [step for step in range(1, 1001) if s.new_widths(step)]
    assert make(**NEVER).prune_steps() == []


def test_the_window_opens_at_prune_start_and_oneshot_closes_it_there():
    early = {"prune_start": 0.1, "prune_end": 0.35, "prune_every": 20}
    s, once = make(**early), make(**early, prune_schedule="oneshot", n_kv_head_target=0)
    assert (s.window, s.prune_steps()[0]) == ((101, 351), 121)
    assert (once.window, once.prune_steps()) == ((101, 101), [101])
    assert once.new_widths(101) == {"d_ff": 176}
    assert once.widths == {"d_ff": Widths(512, 176, 16)}  # no other kind has a target
    wrong = [{"d_ff_target": 513}, {"prune_end": 0.1}, {"prune_start": 0.0}, {"max_steps": 3}]
    wrong += [{"lr_restart": True, "warmup_steps": 100}, NEVER | {"lr_restart": True}]
    wrong += [{"prune_schedule": "one_shot"}, {"d_ff_target": -16}, {"learning_rate": math.nan}]
    wrong += [{"prune_every": 0}, {"round_to": 0}, {"score_beta": 1.0}, {"warmup_steps": -1}]
    wrong += [{"learning_rate": -1.0}, {"min_lr_fraction": -0.1}, {"max_steps": 0}]
    for changes in wrong:  # the last one is to blame
        with pytest.raises(ValueError, match=f"^{[*changes][-1]}="):
            make(**early | {"warmup_steps": 1} | changes)


ALONE = "n_head n_kv_head n_layer num_heads num_attention_heads num_hidden_layers"
GRIDS = [(kind, 1) for kind in ALONE.split()]
GRIDS += [(kind, 8) for kind in ("intermediate_size", "n_inner", "n_embd", "num_experts")]


@pytest.mark.parametrize("kind, grid", GRIDS)
def test_every_kind_has_a_grid_but_numbers_of_heads_and_layers(kind, grid):
    widths = {"round_to": 8, kind: 64, f"{kind}_target": 24}
    assert Schedule(knobs(100, **widths)).widths[kind].grid == grid
    with pytest.raises(ValueError, match=f"^{kind}_end: no such knob"):
        knobs(100, **widths, **{f"{kind}_end": 0.5})
    with pytest.raises(ValueError, match="d_ff_target=5: must be a multiple of round_to=16$"):
        Schedule(knobs(100, d_ff=10, d_ff_target=5, round_to=16))


def test_phases_and_scoring_follow_the_window():
    s = make()
    phases = ["enlarged"] * 500 + ["prune"] * 250 + ["recover"] * 250
    assert [s.phase(t) for t in range(1, 1001)] == phases
    assert [t for t in range(1, 1001) if s.scoring(t)] == list(range(501 - 34, 751))
    once = make(prune_schedule="oneshot")
    assert [t for t in range(1, 1001) if once.scoring(t)] == list(range(467, 501))
    assert once.phase(500) == "enlarged" and once.phase(501) == "recover"
    long = make(score_beta=0.9999)  # averages over more steps than there are
    assert [t for t in range(1, 1001) if long.scoring(t)] == list(range(1, 751))
    never = make(**NEVER)
    assert never.phase(700) == "train" and not any(map(never.scoring, range(1, 1001)))
