"""Members that one batch generates with, over weights that they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from estune.completion import Completion, Sampling
from estune.engines.cpu.members import Members
from estune.engines.cpu.members import Together as Drawer
from estune.engines.together import RowMembers, RowsTogether
from estune.engines.transformers import TransformersEngine
from estune.es.strategy import Member

if TYPE_CHECKING:
    from estune.engines.vllm.engine import VllmEngine
    from estune.engines.vllm.weights import SlotWeights


class Together(Protocol):
    """What takes many members at once, and generates with them."""

    over_base: bool
    """Whether the live weights have to be the base when it takes members; otherwise they are one of these then."""

    apart: bool
    """Whether a member's completions have the same bits, whoever is beside it."""

    def most(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """How many members it takes at once, to complete these prompts; at least 1."""
        ...

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make ready to generate with these members' weights."""
        ...

    def complete(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Generate with the weights of each member that was taken, `[members][prompts]`."""
        ...


class LowRank:
    """As `Together`: noise of low rank, by the kernels for the CPU or by a model's own forward (`engines/`).

    Args:
        engine: that decodes.
        drawer: of the engine's members.
    """

    over_base = True

    def __init__(self, engine: TransformersEngine, drawer: Drawer | RowsTogether) -> None:
        self.apart = isinstance(drawer, Drawer)
        self._engine = engine
        self._drawer = drawer
        self._members: Members | RowMembers | None = None

    def most(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """As `Together.most`."""
        slots = max(map(len, prompt_ids)) + sampling.max_new_tokens
        return self._engine.members_at_once(self._drawer, len(prompt_ids), slots)

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """As `Together.take`."""
        self._members = self._drawer.of(members, sigma)

    def complete(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """As `Together.complete`."""
        assert self._members is not None
        return self._engine.generate_each(self._members, prompt_ids, sampling)


class Slots:
    """As `Together`: members in slots of vLLM's, each an adapter or, with noise of low rank, what it adds to the base.

    Args:
        engine: vLLM's.
        weights: whose members they are.
    """

    apart = True  # as far as vLLM's own batches keep to it

    def __init__(self, engine: VllmEngine, weights: SlotWeights) -> None:
        self.over_base = weights.over_base
        self._engine = engine
        self._weights = weights
        self._taken = 0

    def most(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """As `Together.most`."""
        return self._engine.slots

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """As `Together.take`."""
        self._weights.take(members, sigma)
        self._taken = len(members)

    def complete(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """As `Together.complete`."""
        return self._engine.generate_each(self._taken, prompt_ids, sampling)
