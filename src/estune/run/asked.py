"""A step whose members have been asked: what they are, what they answer, and where answers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estune.es.strategy import Member
from estune.pool.base import Evaluation


@dataclass(frozen=True, slots=True)
class Asked:
    """Members of a step, from the moment on that the pool has them.

    Attributes:
        step: its index, from 0.
        sigma: of the perturbations.
        members: who is asked.
        indices: of the rows, in the training set.
        rows: the rows.
        prompt_ids: their prompts as token ids.
        evaluation: gives the answers.
    """

    step: int
    sigma: float
    members: Sequence[Member]
    indices: list[int]
    rows: Sequence[dict[str, Any]]
    prompt_ids: Sequence[Sequence[int]]
    evaluation: Evaluation
