"""Members in the slots of vLLM's LoRA layers, whatever they add there."""

from __future__ import annotations

from estune.completion import Sampling
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.weights import SlotWeights
from estune.es.strategy import Member
from tests.vllm.pairs import PROMPTS

MEMBERS = [Member(1), Member(2, -1), Member(2**64 - 5)]


def assert_members_are_their_own(
    engine: VllmEngine, weights: SlotWeights, sigma: float, *, temperature: float = 0.0
) -> None:
    """A member's completions are the same whoever is beside it, and the same as by perturbed weights."""
    sampling = Sampling(8, temperature=temperature, seed=3)
    weights.take([*MEMBERS, Member(9)], sigma)
    found = engine.generate_each(4, PROMPTS, sampling)
    weights.take([Member(77), MEMBERS[0]], 3 * sigma)
    engine.generate_each(2, PROMPTS, sampling)
    weights.take([Member(9), MEMBERS[2]], sigma)
    assert engine.generate_each(2, PROMPTS, sampling) == [found[3], found[2]]
    weights.perturb(MEMBERS[1], sigma)
    assert engine.generate(PROMPTS, sampling) == found[1]
    weights.restore()
    assert engine.generate_each(2, [], sampling) == [[], []]
