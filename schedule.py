"""When things happen: learning rate, widths and phase as pure functions of the step. No torch.

Steps count from 1. `width(s, kind)` is the width during step s, in its forward pass. One cosine
spans the whole run. Units are removed in a part of the run, the prune window.

The usual pipeline ("naive") trains, prunes once and trains again, with a second cosine and a fresh
optimizer. It is the same code with lr_restart=True and prune_schedule="oneshot".
"""

import math
import re
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

SCHEDULES = "cubic", "oneshot"  # of the widths


class Schedule:
    """What a run with the knobs `c` (run/config.py) does at each step. Raises ValueError, with the
    knob to blame, where they make no schedule."""

    def __init__(self, c):
        for knob in ("max_steps", "learning_rate", "prune_every", "round_to"):
            require(getattr(c, knob) > 0, c, knob, "must be greater than 0")
        require(0 <= c.score_beta < 1, c, "score_beta", "must be 0 or more, and less than 1")
        require(0 <= c.min_lr_fraction <= 1, c, "min_lr_fraction", "must lie between 0 and 1")
        require(c.prune_schedule in SCHEDULES, c, "prune_schedule", f"must be one of {SCHEDULES}")
        self.c, self.max_steps, self.widths = c, c.max_steps, pruned_widths(c)
        # The steps at which the prune window opens and closes; None: never prune. A prune is due
        # every `prune_every` steps after its opening, and as it closes; one shot has that one alone
        self.window = prune_window(c) if self.widths else None
        # Steps of scoring before the window opens: an older score would weigh less than e^-5
        self.score_steps = math.ceil(5 / (1 - c.score_beta))
        shortest = c.max_steps  # steps of the shorter cosine, if there are two
        if c.lr_restart:
            require(self.window, c, "lr_restart", "restarts as the window opens; no target is set")
            shortest = min(self.window[0] - 1, c.max_steps - self.window[0] + 1)
        advice = f"must be from 0 to below its cosine's {shortest} steps (max_steps={c.max_steps})"
        require(0 <= c.warmup_steps < shortest, c, "warmup_steps", advice)

    def learning_rate(self, step: int) -> float:
        """One linear warm-up and one cosine over the whole run. Naive has two: one before the
        window opens, and one from there on."""
        before = self.window[0] - 1 if self.c.lr_restart else 0
        if step <= before:
            return self.warmup_then_cosine(step, before)
        return self.warmup_then_cosine(step - before, self.max_steps - before)

    def warmup_then_cosine(self, step: int, steps: int) -> float:
        """Linear warm-up to the peak, then half a cosine, which reaches exactly min_lr_fraction of
        the peak at the last step. step: from 1 to `steps`."""
        if step < self.c.warmup_steps:
            return self.c.learning_rate * step / self.c.warmup_steps
        progress = (step - self.c.warmup_steps) / (steps - self.c.warmup_steps)
        floor = self.c.min_lr_fraction * self.c.learning_rate
        return floor + (self.c.learning_rate - floor) * (1 + math.cos(math.pi * progress)) / 2

    def rate_share(self, first: int, last: int) -> float:
        """For a plan: the learning rates of the steps from `first` to `last`, summed, as a share of
        the whole run's. With AdamW, weights move and decay in proportion to it (2405.13698)."""
        every = max(1, self.max_steps // 10_000)  # 1, but in long runs every 2nd, 3rd, ... will do
        rates = {step: self.learning_rate(step) for step in range(1, self.max_steps + 1, every)}
        return sum(r for s, r in rates.items() if first <= s <= last) / (sum(rates.values()) or 1)

    def restarts(self, step: int) -> bool:
        """Whether a second warm-up and cosine begin with this step."""
        return self.c.lr_restart and step == self.window[0]

    def width(self, step: int, kind: str) -> int:
        """How many units of this kind each group has during `step`:
        target + (enlarged - target) (1 - progress)^3, where progress goes from 0 to 1 over the
        window (Zhu & Gupta, 1710.01878): fast while many units are redundant, slow at the end.
        Between two prunes the width stays as it is. It is rounded up to the grid.
        """
        enlarged, target, grid = self.widths[kind]
        opens, closes = self.window
        if step < opens:
            return enlarged
        if step >= closes:
            return target
        pruned = step - (step - opens) % self.c.prune_every  # when it was pruned last
        left = Fraction(closes - pruned, closes - opens)  # 1 - progress; a float is not exact
        exact = target + (enlarged - target) * left**3
        return min(enlarged, math.ceil(exact / grid) * grid)  # enlarged itself may be off the grid

    def new_widths(self, step: int) -> dict[str, int]:
        """Kind of unit -> new width, for each kind that is pruned just before this step."""
        widths = {kind: self.width(step, kind) for kind in self.widths}
        return {kind: width for kind, width in widths.items() if width < self.width(step - 1, kind)}

    def prune_steps(self) -> list[int]:
        """All steps with a prune. One that is due, but would change no width, does not come."""
        if not self.window:
            return []
        opens, closes = self.window
        due = [*range(opens + self.c.prune_every, closes, self.c.prune_every), closes]
        return [step for step in due if self.new_widths(step)]

    def phase(self, step: int) -> str:
        """enlarged, prune or recover (one shot has no "prune"); "train" if the run never prunes."""
        if not self.window:
            return "train"
        opens, closes = self.window
        return "enlarged" if step < opens else "prune" if step < closes else "recover"

    def scoring(self, step: int) -> bool:
        """Whether this step scores units: from `score_steps` before the window to its end."""
        opens, closes = self.window or (0, 0)
        return opens - self.score_steps <= step < closes


def prune_window(c) -> tuple[int, int]:
    """The steps at which the window opens and closes: after prune_start and prune_end of a run."""
    oneshot = c.prune_schedule == "oneshot"
    require(0 < c.prune_start < 1, c, "prune_start", "must lie between 0 and 1")
    within = f"must lie between prune_start={c.prune_start} and 1"
    require(oneshot or c.prune_start < c.prune_end < 1, c, "prune_end", within)
    opens = round(c.prune_start * c.max_steps) + 1
    closes = opens if oneshot else round(c.prune_end * c.max_steps) + 1
    fits = 1 < opens <= closes <= c.max_steps and (oneshot or opens < closes)
    window = f"prune_start={c.prune_start}" + ("" if oneshot else f" to prune_end={c.prune_end}")
    require(fits, c, "max_steps", f"too few for the window from {window}")
    return opens, closes


class Widths(NamedTuple):
    """How many units of a kind there are."""

    enlarged: int  # before the first prune
    target: int  # after the last one
    grid: int  # widths in between are multiples of this


def pruned_widths(c) -> dict[str, Widths]:
    """Kind of unit -> its widths, for each kind with knobs 0 < KIND_target < KIND. The grid is
    round_to, but 1 for numbers of heads and layers, such as n_kv_head and num_hidden_layers."""
    widths = {}
    for kind in (knob.removesuffix("_target") for knob in vars(c) if knob.endswith("_target")):
        enlarged, target = getattr(c, kind), getattr(c, f"{kind}_target")
        grid = 1 if re.fullmatch(r"(n|num)_(\w+_)?(head|layer)s?", kind) else c.round_to
        require(0 <= target <= enlarged, c, f"{kind}_target", f"must be 0 to {kind}={enlarged}")
        if 0 < target < enlarged:
            remedy = f"must be a multiple of round_to={grid}"
            require(target % grid == 0, c, f"{kind}_target", remedy)
            widths[kind] = Widths(enlarged, target, grid)
    return widths


def require(ok: object, c, knob: str, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{knob}={getattr(c, knob)!r}: {remedy}")


def knobs(max_steps: int, **others) -> SimpleNamespace:
    """For a loop of your own: what Schedule asks for. Names and meanings are as in run/config.py,
    some defaults are not. Give each kind of unit its width at the beginning and at the end, such as
    d_ff=1024, d_ff_target=352. With the default peak, 1, learning_rate() is a factor for yours."""
    c = {"prune_schedule": "cubic", "prune_start": 0.1, "prune_end": 0.35, "round_to": 1}
    c |= {"prune_every": max(1, max_steps // 50), "score_beta": 0.85, "lr_restart": False}
    c |= {"learning_rate": 1.0, "min_lr_fraction": 0.1, "warmup_steps": 0, "max_steps": max_steps}
    for key in others.keys() - c.keys():  # a misspelt one would do nothing
        kind = key.removesuffix("_target")
        if not {kind, f"{kind}_target"} <= others.keys():
            raise ValueError(f"{key}: no such knob; of each kind, give KIND and KIND_target")
    return SimpleNamespace(**c | others)
