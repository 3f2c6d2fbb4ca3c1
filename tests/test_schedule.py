"""When things happen: the rate, the widths, the phases, and the knobs that decide them."""

import math
from dataclasses import replace

import pytest

from run.config import Config
from schedule import Schedule, Widths

C = Config(
    max_steps=1000, learning_rate=4e-3, warmup_steps=50, prune_every=10, d_ff=512, d_ff_target=176,
    n_kv_head=4, n_kv_head_target=2,
)  # fmt: skip
NEVER = {"d_ff_target": 0, "n_kv_head_target": 0}


def make(**changes) -> Schedule:
    return Schedule(replace(C, **changes))


def test_one_cosine_never_rises_after_warmup_and_ends_on_the_floor():
    s = make()
    rates = [s.learning_rate(step) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(4e-3 / 50) and rates[49] == max(rates) == 4e-3
    assert all(a < b for a, b in zip(rates[:49], rates[1:50]))
    assert all(a > b for a, b in zip(rates[49:], rates[50:]))
    assert rates[-1] == pytest.approx(4e-4, rel=1e-12) and rates[-2] > rates[-1] * (1 + 1e-7)


def test_one_cosine_is_continuous_across_the_prune_window():
    s = make()
    largest = max(abs(s.learning_rate(t + 1) - s.learning_rate(t)) for t in range(50, 1000))
    assert largest <= 4e-3 * 0.9 * math.pi / 2 / 950 * 1.001  # the cosine's steepest slope


def test_restart_gives_each_stage_its_own_warmup_and_cosine():
    s = make(lr_restart=True, prune_schedule="oneshot")
    assert s.learning_rate(500) == pytest.approx(4e-4)  # the first stage ends on its floor
    assert s.learning_rate(501) == pytest.approx(4e-3 / 50)
    assert s.learning_rate(550) == 4e-3
    assert s.learning_rate(1000) == pytest.approx(4e-4)
    assert [step for step in range(1, 1001) if s.restarts(step)] == [501]
    assert not any(map(make().restarts, range(1, 1001)))


def test_widths_lie_on_the_grid_fall_and_end_at_the_target():
    s = make()
    widths = [s.width(step, "d_ff") for step in range(1, 1001)]
    assert set(widths[:500]) == {512} and set(widths[750:]) == {176} and widths[749] > 176
    assert all(a >= b for a, b in zip(widths, widths[1:]))
    assert all(w % 16 == 0 for w in widths)
    changes = [t for t in range(2, 1001) if widths[t - 1] != widths[t - 2]]
    assert all((t - 501) % 10 == 0 for t in changes) and len(changes) > 5
    for step in (511, 601, 741):
        exact = 176 + 336 * (1 - (step - 501) / 250) ** 3
        assert exact <= widths[step - 1] < exact + 16


def test_the_target_is_met_where_the_interval_does_not_divide_the_window():
    s = make(prune_every=7)
    assert s.width(750, "d_ff") > s.width(751, "d_ff") == 176


def test_a_width_off_the_grid_is_kept_until_the_first_prune():
    s = make(d_ff=500)
    assert s.width(501, "d_ff") == 500
    assert s.width(511, "d_ff") <= 496


def test_oneshot_falls_to_the_target_at_the_start_of_the_window():
    s = make(prune_schedule="oneshot")
    assert (s.width(500, "d_ff"), s.width(501, "d_ff")) == (512, 176)
    assert [step for step in range(1, 1001) if s.new_widths(step)] == [501]


def test_prunes_are_where_a_width_falls_and_lead_to_every_target():
    s, widths = make(), {"d_ff": 512, "n_kv_head": 4}
    for step in range(1, 1001):
        for kind, width in s.new_widths(step).items():
            assert width < widths[kind]
            widths[kind] = width
        assert widths == {kind: s.width(step, kind) for kind in widths}
    assert widths == {"d_ff": 176, "n_kv_head": 2}
    assert s.prune_steps() == [step for step in range(1, 1001) if s.new_widths(step)]
    assert make(**NEVER).prune_steps() == []


def test_a_curve_that_falls_as_the_window_opens_prunes_there(monkeypatch):
    """As where a reader changes the cubic to a jump: width() alone decides."""
    at_once = lambda s, step, kind: 512 if step < s.window[0] else 176  # noqa: E731
    monkeypatch.setattr(Schedule, "width", at_once)
    assert make().prune_steps() == [501]


def test_the_window_opens_at_prune_start_and_oneshot_closes_it_there():
    early = {"prune_start": 0.1, "prune_end": 0.35, "prune_every": 20}
    s, once = make(**early), make(**early, prune_schedule="oneshot", n_kv_head_target=0)
    assert (s.window, s.prune_steps()[0]) == ((101, 351), 121)
    assert (once.window, once.prune_steps()) == ((101, 101), [101])
    assert once.widths == {"d_ff": Widths(512, 176, 16)}  # no other kind has a target
    for knobs, word in (
        ({"d_ff_target": 513}, "d_ff_target"), ({"prune_end": 0.1}, "prune_end"),
        ({"prune_start": 0.0}, "prune_start"), ({"max_steps": 3}, "max_steps"),
        ({"lr_restart": True, "warmup_steps": 100}, "warmup_steps"),
        (NEVER | {"lr_restart": True}, "lr_restart"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{word}="):
            make(**early | {"warmup_steps": 1} | knobs)


def test_phases_and_scoring_follow_the_window():
    s = make()
    assert [s.phase(t) for t in (1, 500, 501, 750, 751, 1000)] == [
        "enlarged", "enlarged", "prune", "prune", "recover", "recover",
    ]  # fmt: skip
    assert [t for t in range(1, 1001) if s.scoring(t)] == list(range(501 - 34, 751))
    once = make(prune_schedule="oneshot")
    assert [t for t in range(1, 1001) if once.scoring(t)] == list(range(467, 501))
    assert once.phase(500) == "enlarged" and once.phase(501) == "recover"
    never = make(**NEVER)
    assert never.phase(700) == "train" and not any(map(never.scoring, range(1, 1001)))
