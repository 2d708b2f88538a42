"""Members of low-rank noise, decoded together, against the same weights made for each alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from estune.completion import Sampling
from estune.engines.cpu.fused import FusedDecoder
from estune.es.strategy import Member
from estune.noise import reference
from estune.pool.replica import drawn
from estune.weights.parameters import own_parameters
from estune.weights.weights import Weights
from tests.engines.test_decode import random_prompts
from tests.engines.test_fused import decoder_of, model_of
from tests.models import build_model

MEMBERS = [Member(5), Member(6, -1), Member(2**60 + 1)]
PROMPTS = [*random_prompts((3, 9, 9, 20)), *random_prompts((2, 5), prefix=11)]
SIGMA = 0.05
NEW = 12


def perturbed(model: Any, member: Member, names: Any, rank: int = 1) -> Any:
    """The model with a member's weights: outer products added to each matrix, its own noise to each vector."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in found.named_parameters():
            if not names(name):
                continue
            key = reference.tensor_id(name)
            if tensor.ndim == 1:
                noise = reference.normal_by_id(member.seed, key, 0, len(tensor))
            else:
                noise = reference.low_rank_by_id(member.seed, key, tensor.shape[1], rank, 0, tensor.numel())
                noise = noise.reshape(tensor.shape)
            tensor.add_(torch.from_numpy(member.sign * np.float32(SIGMA) * noise))
    return found


def rows(decoder: FusedDecoder, prompts: Any, sampling: Sampling, **more: Any) -> list[list[int]]:
    """Completions, the numbers of the prompts counted from 0 for each member."""
    return decoder.run(prompts, [i % len(PROMPTS) for i in range(len(prompts))], sampling, **more).tolist()


def weights_of(model: Any, names: Any, noise: Any = "rank1") -> Weights:
    return Weights([p for p in own_parameters(model) if names(p.name)], noise=noise)


@pytest.mark.parametrize("sampling", [Sampling(NEW), Sampling(NEW, temperature=1.0, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("name", "rank"), [("qwen2", 1), ("mistral", 4), ("llama with biases", 2), ("qwen3", 1)])
@pytest.mark.parametrize("part", ["all", "attention"])
def test_members_complete_as_each_does_alone(name: str, rank: int, part: str, sampling: Sampling) -> None:
    def names(parameter: str) -> bool:
        if name == "qwen3" and "_norm.weight" in parameter and "self_attn" in parameter:
            return False  # of queries and keys
        return part == "all" or "self_attn" in parameter

    model = model_of(name)
    decoder = decoder_of(model, (7,))
    together = decoder.together(drawn(weights_of(decoder.model, names, f"rank{rank}")))
    assert together is not None
    members = together.of(MEMBERS, SIGMA).with_owners(np.repeat(np.arange(3), len(PROMPTS)))
    found = rows(decoder, PROMPTS * 3, sampling, members=members)
    expected = []
    for member in MEMBERS:
        expected += rows(decoder_of(perturbed(model, member, names, rank), (7,)), PROMPTS, sampling)
    assert found == expected
    assert len({tuple(row) for row in found}) > len(PROMPTS), "members too alike to tell a mistake"
    assert rows(decoder, PROMPTS, sampling) == rows(decoder_of(model, (7,)), PROMPTS, sampling)  # nothing stays behind


def test_a_member_does_not_depend_on_those_beside_it_to_the_bit() -> None:
    """Log-probabilities that tokens are drawn by would show a changed bit in some token sooner or later."""
    model = build_model("qwen2", hidden_size=64, head_dim=32)
    decoder = FusedDecoder(model, ())
    together = decoder.together(drawn(weights_of(model, lambda _: True)))
    assert together is not None
    seen: list[Any] = []
    logits = decoder.logits

    def spying(hidden: Any, rows: Any = None) -> torch.Tensor:
        seen.append((rows, logits(hidden, rows)))
        return seen[-1][1]

    decoder.logits = spying  # type: ignore[method-assign]
    sampling = Sampling(NEW, temperature=1.0)
    members = together.of(MEMBERS, SIGMA).with_owners(np.repeat(np.arange(3), len(PROMPTS)))
    rows(decoder, PROMPTS * 3, sampling, members=members)
    whole, seen[:] = list(seen), []
    alone = together.of(MEMBERS[1:2], SIGMA).with_owners(np.zeros(len(PROMPTS), np.int64))
    rows(decoder, PROMPTS, sampling, members=alone)
    count = len(PROMPTS)
    for (these, all_of_them), (those, own) in zip(whole, seen, strict=True):
        assert (these[count : 2 * count] - count == those).all()
        assert torch.equal(all_of_them[count : 2 * count], own)


def test_threads_share_the_columns_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr("estune.engines.cpu.members.SHARED_OUT", 1)
        decoder = decoder_of(model)
        together = decoder.together(drawn(weights_of(decoder.model, lambda _: True)))
        assert together is not None
        members = together.of(MEMBERS, SIGMA).with_owners(np.repeat(np.arange(3), len(PROMPTS)))
        found.append(rows(decoder, PROMPTS * 3, Sampling(NEW, temperature=1.0, seed=3), members=members))
    assert found[0] == found[1]


def test_norms_of_queries_and_keys_that_are_perturbed_are_decoded_member_by_member() -> None:
    decoder = decoder_of(model_of("qwen3"))
    assert decoder.together(drawn(weights_of(decoder.model, lambda _: True))) is None
