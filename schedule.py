"""When: learning rate, widths and phase, as pure functions of the step. No torch.

Steps are counted from 1, and every answer holds DURING that step: `width(s)` is what the model has
in its s-th forward pass. The horizon is the whole run; the prune window lies inside it. The naive
pipeline is the same code with a restart of the learning rate at the prune.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    max_steps: int
    peak: float
    min_lr_fraction: float
    warmup_steps: int
    lr_restart: bool
    restart_fraction: float  # the second stage's peak, as a fraction of the first's
    prune_schedule: str  # "cubic", "linear" or "oneshot"
    window: tuple[int, int] | None  # first and last step of the prune window; None: never prune
    prune_every: int
    score_steps: int  # how many steps before the window scores are gathered

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then one cosine to exactly `min_lr_fraction` of the peak at the last
        step.

        With `lr_restart` the run has two such stages that meet at the start of the prune window,
        and the second climbs to `restart_fraction` of the peak.
        """
        first, last, peak = 1, self.max_steps, self.peak
        floor = self.min_lr_fraction * peak
        if self.lr_restart and self.window:
            restart = self.window[0]
            if step >= restart:
                first, peak = restart, self.restart_fraction * peak
            else:
                last = restart - 1
        done = step - first + 1  # steps of this stage, this one included
        if done < self.warmup_steps:
            return peak * done / self.warmup_steps
        span = last - first + 1 - self.warmup_steps
        progress = (done - self.warmup_steps) / span
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return floor + (peak - floor) * cosine

    def width(self, step: int, full: int, target: int, round_to: int = 1) -> int:
        """How many units of a group are alive during `step`, on its way from `full` to `target`.

        cubic: target + (full - target) (1 - p)^3, p from 0 to 1 over the window (Zhu & Gupta,
        1710.01878): fast while many units are idle, slow at the end. linear: the same with power 1.
        oneshot: `target` from the start of the window. Rounded up to a multiple of `round_to`.
        """
        if self.window is None or step < self.window[0]:
            return full
        first, last = self.window
        if step >= last or self.prune_schedule == "oneshot":
            return target
        event = first + (step - first) // self.prune_every * self.prune_every  # latest, maybe now
        progress = (event - first) / (last - first)
        left = (1 - progress) ** (3 if self.prune_schedule == "cubic" else 1)
        exact = target + (full - target) * left
        return min(full, max(target, math.ceil(exact / round_to) * round_to))

    def phase(self, step: int) -> str:
        """The paper's three phases; "train" in a run that never prunes."""
        if self.window is None:
            return "train"
        first, last = self.window
        if step < first:
            return "enlarged"
        return "prune" if step < last and self.prune_schedule != "oneshot" else "recover"

    def scoring(self, step: int) -> bool:
        """Whether units are scored in this step: just before the window and in it, until its last
        prune."""
        if self.window is None:
            return False
        first, last = self.window
        if self.prune_schedule == "oneshot":
            last = first
        return first - self.score_steps <= step < last
