"""Members of low-rank noise in one batch of a model's own forward, against each member's weights by `generate`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from estune.completion import Sampling
from estune.engines.decode import Decoder
from estune.engines.graph import WARM_UPS
from estune.engines.together import RowsTogether, rows_together
from estune.engines.transformers import TransformersEngine
from estune.es.strategy import Member
from estune.noise import cpu_draw
from estune.pool.replica import Replica, drawn
from estune.run.make import make_sampling
from tests.engines.test_decode import decoder_of, random_prompts, reference, unchanged
from tests.engines.test_graph import static_decoder
from tests.engines.test_members import MEMBERS, SIGMA, perturbed, weights_of
from tests.models import build_model, save_model
from tests.runs import make_config
from tests.tapes import TapeRecorder

PROMPTS = [*random_prompts((3, 9, 20)), *random_prompts((2, 5), prefix=11)]
NEW = 8
PREFIXED = random_prompts((1, 4, 4), prefix=9)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True},  # matrices that are stored turned, biases, positions that rows share
    "gemma3": {},  # embeddings times a scale, norms of queries and keys, a window
    "gemma2": {"sliding_window": 128},
    "qwen3": {},
    "phi3": {},
    "gpt_neox": {},
}
RANKS = {"gemma2": 4, "phi3": 2}  # others have rank one


@functools.cache
def model_of(name: str) -> Any:
    return build_model(name, **FAMILIES[name])


@functools.cache
def expected(name: str, member: int, part: str) -> Any:
    return unchanged(perturbed(model_of(name), MEMBERS[member], PARTS[part], RANKS.get(name, 1)))


PARTS = {"all": lambda _: True, "attention": lambda name: "attn" in name or "attention" in name}


def opened(decoder: Decoder, part: str, rank: int = 1) -> RowsTogether:
    found = rows_together(decoder.model, drawn(weights_of(decoder.model, PARTS[part], f"rank{rank}")))
    assert isinstance(found, RowsTogether)
    return found


def rows(decoder: Decoder, found: RowsTogether, prompts: list[list[int]], chosen: list[int]) -> list[list[int]]:
    """Completions of all prompts by these of the members, `[members * prompts]`."""
    members = found.of([MEMBERS[i] for i in chosen], SIGMA)
    owners = np.repeat(np.arange(len(chosen)), len(prompts))
    asked = prompts * len(chosen)
    made = decoder.run(asked, list(range(len(asked))), Sampling(NEW), members.with_owners(owners)).tolist()
    assert not any("forward" in vars(module) for module in decoder.model.modules())  # nothing stays behind
    return made


@pytest.mark.parametrize(("name", "part"), [*((name, "all") for name in FAMILIES), ("gpt2", "attention")])
def test_members_complete_as_each_does_alone(name: str, part: str) -> None:
    decoder = decoder_of(model_of(name))
    found = opened(decoder, part, RANKS.get(name, 1))
    for prompts in (PROMPTS[1:], PREFIXED) if name == "gpt2" else (PROMPTS[1:4],):
        made = rows(decoder, found, prompts, [0, 1])
        assert made == [reference(expected(name, i, part), prompt, NEW) for i in range(2) for prompt in prompts]
    assert len({tuple(row) for row in made}) > len(prompts), "members too alike to tell a mistake"
    alone = decoder.run(PREFIXED, [0, 1, 2], Sampling(NEW)).tolist()
    assert alone == [reference(unchanged(model_of(name)), prompt, NEW) for prompt in PREFIXED]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_static_steps_are_taped_once_for_all_members(name: str) -> None:
    recorder = TapeRecorder()
    decoder = static_decoder(model_of(name), recorder=recorder)
    decoder.check_every = 1
    found = opened(decoder, "all", RANKS.get(name, 1))
    for chosen in ([0, 1], [1, 2], [2, 0]):
        for _ in range(WARM_UPS):
            made = rows(decoder, found, PREFIXED, chosen)
            assert made == [reference(expected(name, i, "all"), prompt, NEW) for i in chosen for prompt in PREFIXED]
    assert recorder.replayed > 4 * NEW
    taped = len(decoder.replays)
    rows(decoder, found, PREFIXED, [1, 0])
    assert len(decoder.replays) == taped
    assert rows(decoder, found, PREFIXED, [0, 1, 2])[-1:] == [reference(expected(name, 2, "all"), PREFIXED[-1], NEW)]


def test_rows_that_end_leave_with_their_members() -> None:
    plain = [reference(expected("gpt2", i, "all"), prompt, NEW) for i in range(3) for prompt in PROMPTS]
    ends = {plain[0][3], plain[7][5]}
    for decoder in (decoder_of(model_of("gpt2"), tuple(ends)), static_decoder(model_of("gpt2"), tuple(ends))):
        decoder.check_every = 1
        made = rows(decoder, opened(decoder, "all"), PROMPTS, [0, 1, 2])
        for row, whole in zip(made, plain, strict=True):
            stop = next((i + 1 for i, token in enumerate(whole) if token in ends), NEW)
            assert row[:stop] == whole[:stop]


class Sides(torch.nn.Linear):
    """A layer that may do something else."""


def test_what_is_not_served_is_said() -> None:
    model = build_model("qwen3_moe")
    found = rows_together(model, drawn(weights_of(model, PARTS["all"])))
    assert isinstance(found, str)
    assert "experts" in found or "gate" in found or "rows of the batch" in found
    assert isinstance(rows_together(model, drawn(weights_of(model, PARTS["attention"]))), RowsTogether)
    model = build_model("llama")
    own = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Sides(own.in_features, own.out_features, bias=False)
    why = rows_together(model, drawn(weights_of(model, PARTS["all"])))
    assert why == "model.layers.0.mlp.up_proj.weight is no part of a linear layer, a table of embeddings or a norm"


def test_a_replica_decodes_members_together_around_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "gpt2")
    config = make_config(tmp_path / "run", model, noise="rank1", sigma_scale={"*wte*": 0.5})
    prompts = [[9, 8, 7], [30, 40], [5] * 6]
    sampling = make_sampling(config)
    members = [Member(1), Member(2, -1), Member(3)]
    monkeypatch.setattr("estune.engines.transformers.TOGETHER", ())
    one_by_one = Replica(config)
    assert one_by_one.at_once(prompts, sampling) == 1
    expected = [one_by_one.evaluate(member, 0.02, prompts, sampling).completions for member in members]
    monkeypatch.setattr("estune.engines.transformers.TOGETHER", ["cpu"])
    replica = Replica(config)
    assert replica.at_once(prompts, sampling) >= 3
    # Who is beside whom is the same with more engines.
    assert replica.at_once(prompts, sampling, share=1) == replica.at_once(prompts, sampling)
    replica.take(members, 0.02)
    found = replica.complete_each(prompts, sampling)
    assert [[c.token_ids for c in row] for row in found] == [[c.token_ids for c in row] for row in expected]
    engine: Any = replica.engine
    assert isinstance(engine, TransformersEngine)
    drawer: Any = engine.together(drawn(replica.weights))  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "batch_memory", 2 * drawer.member_bytes)
    assert replica.at_once(prompts, sampling) <= 2


def test_vectors_of_one_member_are_the_specifications() -> None:
    model = model_of("gpt2")
    found = opened(decoder_of(model), "all")
    members = found.of([MEMBERS[1]], SIGMA)
    one = found.served[0]  # the table of embeddings
    key = one.parameters["weight"].noise
    a = cpu_draw.normal(MEMBERS[1].seed, key, 0, len(one.module.weight))
    own = one.of("weight", torch.zeros(1, dtype=torch.int64))
    assert own is not None
    assert np.array_equal(own[0, 0].numpy(), a * np.float32(-SIGMA))
    assert members.count == 1
