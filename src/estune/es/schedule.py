"""Schedules: how sigma and the learning rate change over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Course = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A factor that rises linearly to 1 over the first steps and then falls to `end`.

    f(s) = (s + 1) / (warmup + 1) before step `warmup`; from there on, with p going from 0 to 1 at the end of the run,
    end + (1 - end) * g(p), where g is 1 (constant), 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).
    """

    course: Course = "constant"
    end: float = 0.0  # the factor after the last step; a constant course does not fall
    warmup: int = 0  # steps

    def factor(self, step: int, steps: int) -> float:
        """The factor in a step, from 0, of a run of so many steps."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min((step - self.warmup) / max(1, steps - self.warmup), 1.0)
        match self.course:
            case "linear":
                fallen = 1 - progress
            case "cosine":
                fallen = (1 + math.cos(math.pi * progress)) / 2
            case _:
                return 1.0
        return self.end + (1 - self.end) * fallen
