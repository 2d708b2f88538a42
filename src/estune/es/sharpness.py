"""Sharpness-aware steps: down along the gradient first, then the update that is found there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from estune.es.earlier import norm
from estune.es.strategy import Member


@dataclass(frozen=True, slots=True)
class SharpnessAware:
    """Two steps in one (SAM: Foret et al. 2021, arXiv 2010.01412, equation 2 and algorithm 1).

    With w_n the weights of the first step's members, its update is what makes the reward worst at a distance of rho
    sigmas, by the gradient that these members estimate: theta <- theta - rho sigma sum_n w_n eps_n / ||w||. The second
    step's members are perturbed around there. Its update takes that back, with the same seeds and coefficients of the
    other sign, and adds its own as ever.

    SAM divides by the gradient's norm; that of sum_n w_n eps_n is ||w|| times the root of the number of parameters, as
    noise of different seeds is orthogonal. So rho is a length by parameter: for 1, as far away as a member is.
    """

    rho: float

    def down(self, members: Sequence[Member], weights: Sequence[float], sigma: float) -> float:
        """By what the first step's weights are multiplied; 0 where these lead nowhere.

        Args:
            members: that have a reward.
            weights: of each.
            sigma: by which they were perturbed.
        """
        length = norm([(m.seed, m.sign * w) for m, w in zip(members, weights, strict=True)])
        return -self.rho * sigma / length if length else 0.0
