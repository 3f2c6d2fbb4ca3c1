"""When things happen: learning rate, widths and phase as pure functions of the step.

Steps count from 1. `width(step, kind)` is the width during this step, in its forward
pass. One cosine spans the whole run. Units are removed in a part of the run, the prune
window. This file imports neither torch nor anything else of this project.

The usual pipeline ("naive") trains, prunes once and trains again, with a second cosine
and a fresh optimizer. It is the same code with lr_restart=True and
prune_schedule="oneshot".
"""

import math
import re
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

SCHEDULES = ("cubic", "oneshot")  # of the widths


class Schedule:
    """What a run does at each step.

    config: an object with the knobs as attributes: a Config (configs/__init__.py), or
    what knobs() returns. Raises ValueError, which names a knob, if its value makes no
    schedule.
    """

    def __init__(self, config):
        check_knobs(config)
        self.config = config
        self.max_steps = config.max_steps
        self.widths = pruned_widths(config)
        # The steps at which the prune window opens and closes. None: never prune
        self.window = None
        if self.widths:
            self.window = prune_window(config)
        # Steps of scoring before the window opens. A score from an earlier step would
        # weigh less than e^-5 in the running average.
        self.score_steps = math.ceil(5 / (1 - config.score_beta))
        self.check_cosines()

    def check_cosines(self) -> None:
        """Raise ValueError unless each cosine is longer than its warm-up."""
        config = self.config
        shortest = config.max_steps
        if config.lr_restart:
            advice = "restarts as the window opens; no target is set"
            require(self.window, config, "lr_restart", advice)
            steps_before = self.window[0] - 1
            shortest = min(steps_before, config.max_steps - steps_before)
        limit = f"below its cosine's {shortest} steps (max_steps={config.max_steps})"
        fits = 0 <= config.warmup_steps < shortest
        require(fits, config, "warmup_steps", f"must be from 0 to {limit}")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step.

        There is one linear warm-up and one cosine over the whole run. Naive has two:
        one before the window opens, and one from there on.
        """
        first_steps = 0
        if self.config.lr_restart:
            first_steps = self.window[0] - 1
        if step <= first_steps:
            return self.warmup_then_cosine(step, first_steps)
        return self.warmup_then_cosine(step - first_steps, self.max_steps - first_steps)

    def warmup_then_cosine(self, step: int, steps: int) -> float:
        """Return the learning rate of a step from 1 to `steps`.

        It rises linearly to the peak. Then it falls along half a cosine, which reaches
        exactly min_lr_fraction of the peak at the last step.
        """
        peak = self.config.learning_rate
        warmup_steps = self.config.warmup_steps
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / (steps - warmup_steps)
        floor = self.config.min_lr_fraction * peak
        cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
        return floor + (peak - floor) * cosine

    def rate_share(self, first: int, last: int) -> float:
        """Return the share that these steps have in the sum of all learning rates.

        A plan prints it, because with AdamW weights move and decay in proportion to
        this sum (2405.13698).
        """
        stride = max(1, self.max_steps // 10_000)  # a sample is enough in a long run
        steps = range(1, self.max_steps + 1, stride)
        rates = {step: self.learning_rate(step) for step in steps}
        total = sum(rates.values())
        if total == 0:
            return 0.0
        share = sum(rate for step, rate in rates.items() if first <= step <= last)
        return share / total

    def restarts(self, step: int) -> bool:
        """Return whether a second warm-up and cosine begin with this step."""
        return self.config.lr_restart and step == self.window[0]

    def width(self, step: int, kind: str) -> int:
        """Return how many units of this kind each group has during a step.

        The width is target + (enlarged - target) (1 - progress)^3, where progress goes
        from 0 to 1 over the window (Zhu & Gupta, 1710.01878). It falls fast while many
        units are redundant, and slowly at the end. It is constant between two prunes,
        and rounded up to the grid.
        """
        enlarged, target, grid = self.widths[kind]
        opens, closes = self.window
        if step < opens:
            return enlarged
        if step >= closes:
            return target
        last_prune = step - (step - opens) % self.config.prune_every
        # This is 1 - progress, as a fraction, because a float is not exact
        left = Fraction(closes - last_prune, closes - opens)
        exact = target + (enlarged - target) * left**3
        rounded = math.ceil(exact / grid) * grid
        return min(enlarged, rounded)  # enlarged itself may be off the grid

    def new_widths(self, step: int) -> dict[str, int]:
        """Return the new width of each kind that is pruned just before this step."""
        changed = {}
        for kind in self.widths:
            width = self.width(step, kind)
            if width < self.width(step - 1, kind):
                changed[kind] = width
        return changed

    def prune_steps(self) -> list[int]:
        """Return all steps with a prune.

        Prune every `prune_every` steps after the window opens, and once more as it
        closes. One-shot prunes only then. Prunes that would not change a width are
        skipped.
        """
        if not self.window:
            return []
        opens, closes = self.window
        every = self.config.prune_every
        due = [*range(opens + every, closes, every), closes]
        return [step for step in due if self.new_widths(step)]

    def segments(self) -> list[tuple[int, dict[str, int]]]:
        """The run in stretches of constant widths: (number of steps, kind -> width)."""
        starts = [1, *self.prune_steps(), self.max_steps + 1]
        segments = []
        for start, end in pairwise(starts):
            widths = {kind: self.width(start, kind) for kind in self.widths}
            segments.append((end - start, widths))
        return segments

    def phase(self, step: int) -> str:
        """Return "enlarged", "prune" or "recover", or "train" if the run never prunes.

        One-shot has no steps in the phase "prune".
        """
        if not self.window:
            return "train"
        opens, closes = self.window
        if step < opens:
            return "enlarged"
        if step < closes:
            return "prune"
        return "recover"

    def scoring(self, step: int) -> bool:
        """Return whether this step scores units.

        Scoring starts `score_steps` before the window opens, and ends as it closes.
        """
        if not self.window:
            return False
        opens, closes = self.window
        return opens - self.score_steps <= step < closes


def prune_window(config) -> tuple[int, int]:
    """Return the steps at which the window opens and closes.

    It opens after the fraction prune_start of max_steps, and closes after the fraction
    prune_end. One-shot closes it as it opens. Raises ValueError if these fractions make
    no window.
    """
    start = config.prune_start
    end = config.prune_end
    max_steps = config.max_steps
    require(0 < start < 1, config, "prune_start", "must lie between 0 and 1")
    opens = round(start * max_steps) + 1
    if config.prune_schedule == "oneshot":
        closes = opens
        window = f"prune_start={start}"
        is_long_enough = True
    else:
        advice = f"must lie between prune_start={start} and 1"
        require(start < end < 1, config, "prune_end", advice)
        closes = round(end * max_steps) + 1
        window = f"prune_start={start} to prune_end={end}"
        is_long_enough = opens < closes
    is_within_run = opens > 1 and closes <= max_steps
    fits = is_within_run and is_long_enough
    require(fits, config, "max_steps", f"too few for the window from {window}")
    return opens, closes


class Widths(NamedTuple):
    """How many units of a kind there are."""

    enlarged: int  # before the first prune
    target: int  # after the last prune
    grid: int  # every width in between is a multiple of this


def pruned_widths(config) -> dict[str, Widths]:
    """Return the widths of each kind of unit that is pruned.

    A kind is pruned if it has knobs with 0 < KIND_target < KIND. Raises ValueError if a
    target is negative, larger than KIND or off the grid.
    """
    widths = {}
    for knob in vars(config):
        if not knob.endswith("_target"):
            continue
        kind = knob.removesuffix("_target")
        enlarged = getattr(config, kind)
        target = getattr(config, knob)
        is_possible = 0 <= target <= enlarged
        require(is_possible, config, knob, f"must be 0 to {kind}={enlarged}")
        if 0 < target < enlarged:
            grid = grid_of(kind, config.round_to)
            advice = f"must be a multiple of round_to={grid}"
            require(target % grid == 0, config, knob, advice)
            widths[kind] = Widths(enlarged, target, grid)
    return widths


def grid_of(kind: str, round_to: int) -> int:
    """Return the number that divides every width of this kind.

    It is 1 for numbers of heads and layers, such as n_kv_head and num_hidden_layers.
    """
    counts_heads_or_layers = re.fullmatch(r"(n|num)_(\w+_)?(head|layer)s?", kind)
    return 1 if counts_heads_or_layers else round_to


def check_knobs(config) -> None:
    """Raise ValueError if a knob has a value that no schedule can use."""
    for knob in ("max_steps", "learning_rate", "prune_every", "round_to"):
        is_positive = getattr(config, knob) > 0
        require(is_positive, config, knob, "must be greater than 0")
    averages = 0 <= config.score_beta < 1
    require(averages, config, "score_beta", "must be 0 or more, and less than 1")
    is_fraction = 0 <= config.min_lr_fraction <= 1
    require(is_fraction, config, "min_lr_fraction", "must lie between 0 and 1")
    is_known = config.prune_schedule in SCHEDULES
    require(is_known, config, "prune_schedule", f"must be one of {SCHEDULES}")


def require(condition: object, config, knob: str, advice: str) -> None:
    """Raise ValueError, with the knob and its value, unless the condition holds."""
    if not condition:
        raise ValueError(f"{knob}={getattr(config, knob)!r}: {advice}")


def knobs(max_steps: int, **others) -> SimpleNamespace:
    """Return the knobs that Schedule asks for, for a training loop of your own.

    Their names and meanings are those of configs/__init__.py, but some defaults are
    not. Give each kind of unit its width at the beginning and at the end, such as
    d_ff=1024, d_ff_target=352. With the default peak, 1, learning_rate() is a factor
    for your own learning rate. Raises ValueError if a name is unknown.
    """
    defaults = {
        "max_steps": max_steps,
        "learning_rate": 1.0,
        "min_lr_fraction": 0.1,
        "warmup_steps": 0,
        "lr_restart": False,
        "score_beta": 0.85,
        "prune_schedule": "cubic",
        "prune_start": 0.1,
        "prune_end": 0.35,
        "prune_every": max(1, max_steps // 50),
        "round_to": 1,
    }
    for knob in others.keys() - defaults.keys():
        kind = knob.removesuffix("_target")
        if kind not in others or f"{kind}_target" not in others:
            advice = "no such knob; of each kind, give KIND and KIND_target"
            raise ValueError(f"{knob}: {advice}")
    return SimpleNamespace(**defaults | others)
