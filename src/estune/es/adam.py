"""Adam on the estimate of the gradient: a step size for each parameter, by the moments of what updates add there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from estune.es.strategy import Moments, float32

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Adam:
    """From a step's learning rate to how its update is scaled (Kingma and Ba, arXiv 1412.6980, algorithm 1).

    With g = 1/N sum_n z_n eps_n, m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, the update is
    alpha / sqrt(N) * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon).

    The factor 1 / sqrt(N) lets alpha mean what it does without: z-scored rewards that say nothing of a parameter give
    it a g of variance 1/N, and so a step of alpha / sqrt(N), as the plain update has.
    """

    beta1: float = 0.9
    beta2: float = 0.999

    def moments(self, alpha: float, members: int, number: int) -> Moments:
        """How an update is scaled.

        Args:
            alpha: the step's learning rate.
            members: that have a reward (N).
            number: of the update among those that change anything, from 1 (t).
        """
        return Moments(
            float32(alpha / math.sqrt(members) / (1 - self.beta1**number)),
            float32(self.beta1),
            float32(self.beta2),
            float32(1 / (1 - self.beta2**number)),
            float32(EPSILON),
        )
