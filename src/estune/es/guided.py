"""Guided directions: a share of each perturbation along recent updates, as sums of the seeds that made these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from estune.es.earlier import norm, scaled
from estune.es.strategy import Member, Pair, float32
from estune.noise.reference import normal_by_id, tensor_id

_KEY = tensor_id("guided directions")


@dataclass(frozen=True, slots=True)
class Guided:
    """Members that look further where the last steps went (guided ES: Maheswaranathan et al. 2019, arXiv 1806.10230).

    With u_j = sum_i c_ji eps_ji what the j-th last step's own members gave, a member of noise eps_n is perturbed by
    delta_n = sqrt(1 - share) eps_n + sqrt(share / k) sum_j z_nj u_j / ||c_j||, with k the steps in the window that
    moved the base and z_nj standard normals of its seed. The update is alpha / N sum_n w_n delta_n, as without.

    Their covariance share / k U U^T + (1 - share) / n I has an orthonormal U. Columns u_j / (sqrt(n) ||c_j||) are that
    but for 1 / sqrt(n), as noise of different seeds is, so that each element of delta_n has variance 1.
    """

    share: float = 0.5
    window: int = 1  # steps back at most

    def members(self, members: Sequence[Member], past: Sequence[Sequence[Pair]]) -> list[Member]:
        """These members, perturbed along the past as well; those of sign 0 as they are.

        Args:
            members: each with its own noise alone.
            past: of the last steps, the latest first, what their own members gave.
        """
        sizes = self._sizes(past)
        if not any(sizes):
            return list(members)
        own = float32(math.sqrt(1 - self.share))
        return [
            replace(
                m, own=own, along=scaled(past, [float32(z * s) for z, s in zip(self._draws(m), sizes, strict=False)])
            )
            if m.sign
            else m
            for m in members
        ]

    def own(self, past: Sequence[Sequence[Pair]]) -> float:
        """The factor of the members' own noise in an update."""
        return math.sqrt(1 - self.share) if any(self._sizes(past)) else 1.0

    def factors(
        self, members: Sequence[Member], weights: Sequence[float], past: Sequence[Sequence[Pair]]
    ) -> list[float]:
        """By what the past steps' terms are multiplied in the update.

        Args:
            members: that have a reward.
            weights: alpha / N w_n of each.
            past: as `members` takes it.
        """
        sizes = self._sizes(past)
        drawn = [[member.sign * z for z in self._draws(member)] for member in members]
        return [
            size * math.fsum(weight * z[j] for weight, z in zip(weights, drawn, strict=True)) if size else 0.0
            for j, size in enumerate(sizes)
        ]

    def _sizes(self, past: Sequence[Sequence[Pair]]) -> list[float]:
        """sqrt(share / k) / ||c_j|| for each step of the window; 0 for one that moved nothing."""
        norms = [norm(terms) for terms in past[: self.window]]
        count = sum(n > 0 for n in norms)
        return [math.sqrt(self.share / count) / n if n else 0.0 for n in norms]

    def _draws(self, member: Member) -> list[float]:
        """Standard normals of a member's seed, one for each step of the window."""
        found: list[float] = normal_by_id(member.seed, _KEY, 0, self.window).tolist()
        return found
