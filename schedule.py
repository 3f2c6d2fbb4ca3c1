"""When things happen: learning rate, widths and phase as pure functions of the step. No torch.

Steps count from 1. `width(s, kind)` is the width during step s, in its forward pass. One cosine
spans the whole run. Units are removed inside a part of the run, the prune window.

The usual pipeline ("naive") trains, prunes once and trains again, with a second cosine and a fresh
optimizer. It is the same code with `lr_restart` and prune_schedule "oneshot".
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    max_steps: int
    peak: float  # the highest learning rate
    min_lr_fraction: float  # the last step has this fraction of the peak
    warmup_steps: int
    lr_restart: bool
    prune_schedule: str  # "cubic" or "oneshot"
    # (first, last) step of the prune window. Step `first` still has the full width. Then a prune
    # may come every prune_every steps. Step `last` has the target. With oneshot, step `first` has
    # it already. None: never prune.
    window: tuple[int, int] | None
    prune_every: int
    score_steps: int  # for how many steps units are scored before the window opens
    # Kind of unit -> (first width, last width, grid). The widths in between lie on the grid.
    widths: dict[str, tuple[int, int, int]]

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then one cosine to exactly `min_lr_fraction` of the peak at the last
        step. With `lr_restart` the run has two such stages; the second begins with the window.
        """
        first, last = 1, self.max_steps  # of this stage
        if self.lr_restart and step >= self.window[0]:
            first = self.window[0]
        elif self.lr_restart:
            last = self.window[0] - 1
        n = step - first + 1  # this is the n-th step of the stage
        if n < self.warmup_steps:
            return self.peak * n / self.warmup_steps
        progress = (n - self.warmup_steps) / (last - first + 1 - self.warmup_steps)
        floor = self.min_lr_fraction * self.peak
        return floor + (self.peak - floor) * (1 + math.cos(math.pi * progress)) / 2

    def restarts(self, step: int) -> bool:
        """Whether a second warm-up and cosine begin with this step."""
        return self.lr_restart and step == self.window[0]

    def width(self, step: int, kind: str) -> int:
        """How many units of this kind each group has during `step`.

        cubic: target + (full - target) (1 - p)^3, p from 0 to 1 over the window (Zhu & Gupta,
        1710.01878): fast while many units are redundant, slow at the end. The width changes every
        `prune_every` steps and at the end of the window, and is rounded up to the grid. oneshot:
        `target` from the start of the window.
        """
        full, target, grid = self.widths[kind]
        if self.window is None or step < self.window[0]:
            return full
        first, last = self.window
        if step >= last or self.prune_schedule == "oneshot":
            return target
        due = step - (step - first) % self.prune_every  # the last step where a prune was due
        progress = (due - first) / (last - first)
        left = (1 - progress) ** 3
        exact = target + (full - target) * left
        on_grid = math.ceil(exact / grid) * grid
        return min(full, max(target, on_grid))  # full itself may be off the grid

    def prunes(self, step: int) -> dict[str, int]:
        """Kind of unit -> new width, for each kind that is pruned just before this step."""
        widths = {kind: self.width(step, kind) for kind in self.widths}
        return {kind: width for kind, width in widths.items() if width < self.width(step - 1, kind)}

    def phase(self, step: int) -> str:
        """One of the three phases of IDEA Prune: enlarged, prune, recover. One-shot pruning has no
        phase "prune". A run that never prunes is in phase "train"."""
        if self.window is None:
            return "train"
        first, last = self.window
        if step < first:
            return "enlarged"
        return "prune" if step < last and self.prune_schedule != "oneshot" else "recover"

    def scoring(self, step: int) -> bool:
        """Whether units are scored in this step: from `score_steps` before the window opens to the
        step before the last prune."""
        if self.window is None:
            return False
        first, last = self.window
        if self.prune_schedule == "oneshot":
            last = first
        return first - self.score_steps <= step < last
