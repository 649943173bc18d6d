"""Learning rate schedules."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak learning rate, then a decay that would reach 0 one step after the last.

    With n steps and w = floor(warmup_ratio * n) warm-up steps, step t (from 0) has the peak learning rate times

    - (t + 1) / (w + 1) for t < w, so that the first step already trains,
    - 1 for `constant`, 1 - s for `linear`, (1 + cos(pi s)) / 2 for `cosine` (Loshchilov and Hutter 2017, "SGDR",
      eq. 5) for t >= w, with s = (t - w) / (n - w).

    Step w has the peak learning rate. As `warmup_ratio` is less than 1, there always is such a step.
    """

    decay: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    """At least 0, less than 1."""

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, as a share of the peak."""
        warmup = int(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / (steps - warmup), 1.0)
        match self.decay:
            case "linear":
                return 1 - progress
            case "cosine":
                return (1 + math.cos(math.pi * progress)) / 2
            case "constant":
                return 1.0
