"""The fused decode loop against transformers' `generate`."""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from estune.completion import Sampling
from estune.engines.cpu import fused, products
from estune.engines.cpu.fused import FusedDecoder, unfusable
from estune.engines.decode import Decoder
from estune.engines.progress import OWN
from estune.engines.score import log_probabilities
from estune.engines.tree import PromptTree, common_prefix
from estune.errors import EstuneError
from tests.engines.test_decode import assert_counted, cut, decode, random_prompts, reference, unchanged
from tests.models import build_model

NEW = 20
# What each family has of its own: biases, norms of queries and keys, an untied head, biases everywhere.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    # Of a width whose kernels `test_attention_equals_pytorch` compiles as well: seconds each.
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 128}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}
MIXED = random_prompts((1, 3, 9, 9, 16, 22, 30))
PREFIXED = random_prompts((2, 2, 5, 14), prefix=37)  # a prefix of more than two sixteens
EVEN = random_prompts((13, 13, 13, 13))
BRANCHING = [EVEN[0], EVEN[0][:9] + EVEN[1][9:], EVEN[0][:9] + EVEN[1][9:12], EVEN[0], EVEN[2][:1], EVEN[0][:4]]


@functools.cache
def model_of(name: str) -> Any:
    family, changes = FAMILIES[name]
    return unchanged(build_model(family, **{"hidden_size": 64, "head_dim": 32, **changes}))


def decoder_of(model: Any, end_ids: tuple[int, ...] = ()) -> FusedDecoder:
    """A decoder of a copy, so that `model` stays as transformers built it."""
    return FusedDecoder(copy.deepcopy(model), end_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_completions_equal_generate(name: str) -> None:
    model = model_of(name)
    assert unfusable(model) is None
    decoder = decoder_of(model)
    for prompts in (MIXED, PREFIXED, EVEN, BRANCHING):
        expected = [reference(model, prompt) for prompt in prompts]
        assert sum(len(set(row)) for row in expected) > 8 * len(expected), "completions too dull to tell a mistake"
        assert decode(decoder, prompts) == expected


@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_prefill_in_small_pieces_equals_generate(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PREFILL_TOKENS", tokens)
    model = model_of("qwen2")
    decoder = decoder_of(model)
    for prompts in (MIXED, PREFIXED, BRANCHING, [EVEN[0]] * 3, [EVEN[0][:1]] * 2):
        assert decode(decoder, prompts) == [reference(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("rows", [100, 63])
def test_a_head_in_several_parts_takes_the_same_tokens(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3")
    whole = decode(decoder_of(model), MIXED)
    monkeypatch.setattr(fused, "HEAD_ROWS", rows)  # cut by 63, the last part would be less than a vector
    assert 0 < model.config.vocab_size % 63 < 16
    assert decode(decoder_of(model), MIXED) == whole


def test_a_cache_too_large_says_what_to_lower() -> None:
    with pytest.raises(EstuneError, match=r"out of memory for the key/value cache.*lower batch_size or max_new_tokens"):
        decoder_of(model_of("qwen2")).caches.kept("rows", 1 << 30, 1 << 20)


def test_several_threads_take_the_same_tokens() -> None:
    model = model_of("qwen2")
    decoder = decoder_of(model)
    expected = [reference(model, prompt) for prompt in MIXED]
    torch.set_num_threads(2)
    try:
        assert decode(decoder, MIXED) == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_bit_of_a_row_depends_on_the_rows_beside_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)  # else PyTorch's, without a matrix unit
    decoder = decoder_of(copy.deepcopy(model_of("qwen2")).to(dtype))
    largest = decoder.largest
    hidden: list[Any] = []
    monkeypatch.setattr(decoder, "largest", lambda h, rows: hidden.append(h) or largest(h, rows))

    def states(prompts: list[list[int]]) -> list[Any]:
        """The hidden states of each prompt's last token and of what follows, `[prompts, NEW, hidden]`."""
        hidden.clear()
        decode(decoder, prompts)
        return list(np.stack(hidden, axis=1))

    prompts = sorted(MIXED + PREFIXED + BRANCHING, key=len)
    alone = [states([prompt])[0] for prompt in prompts]
    assert all(np.array_equal(*pair) for pair in zip(states(prompts), alone, strict=True))
    few = slice(-len(PREFIXED), None)  # which share a prefix
    torch.set_num_threads(2)
    try:
        assert all(np.array_equal(*pair) for pair in zip(states(prompts[few]), alone[few], strict=True))
    finally:
        torch.set_num_threads(1)


def test_rows_that_end_leave_the_batch() -> None:
    model = model_of("qwen2")
    plain = [reference(model, prompt) for prompt in MIXED]
    end_ids = (plain[0][4], plain[2][9], plain[3][0], plain[5][14])
    expected = [reference(model, prompt, end_ids=end_ids) for prompt in MIXED]
    assert len({len(row) for row in expected}) > 3
    decoder = decoder_of(model, end_ids)
    tokens: list[int] = []
    forward = decoder.forward
    decoder.forward = lambda ids, *rest: (tokens.append(len(ids)), forward(ids, *rest))[1]  # type: ignore[method-assign]
    before = OWN.now()
    assert cut(decode(decoder, MIXED), end_ids) == expected
    assert_counted(OWN.now().since(before), MIXED, expected)
    alive = [sum(len(row) > step for row in expected) for step in range(1, max(map(len, expected)))]
    assert tokens[1:] == alive, "not every forward had just the rows that go on"


def test_what_prompts_share_is_computed_once() -> None:
    decoder = decoder_of(model_of("qwen2"))
    tokens: list[int] = []
    forward = decoder.forward
    decoder.forward = lambda ids, *rest: (tokens.append(len(ids)), forward(ids, *rest))[1]  # type: ignore[method-assign]
    decode(decoder, BRANCHING, Sampling(1))
    beginnings = {tuple(prompt[:n]) for prompt in BRANCHING for n in range(1, len(prompt) + 1)}
    assert sum(tokens) == len(beginnings)


def test_nothing_of_earlier_calls_is_read() -> None:
    model = model_of("qwen3")
    end_id = reference(model, MIXED[4])[5]
    decoder = decoder_of(model, (end_id,))
    batches = (MIXED, PREFIXED, EVEN, BRANCHING)
    first = [cut(decode(decoder, prompts), (end_id,)) for prompts in batches]
    buffers = dict(decoder.caches.storage)
    for prompts, expected in zip(batches, first, strict=True):
        for buffer in decoder.caches.storage.values():
            buffer.fill(math.nan)
        assert cut(decode(decoder, prompts), (end_id,)) == expected
    assert all(decoder.caches.storage[name] is buffer for name, buffer in buffers.items()), "storage was allocated anew"


def test_weights_changed_in_place_are_used() -> None:
    model = build_model("qwen2", hidden_size=64, head_dim=32)
    decoder = decoder_of(model)
    before = decode(decoder, EVEN)
    for name, own in model.named_parameters():
        if "proj" in name or "norm" in name:
            factor = 1.0 + 0.1 * random.Random(name).random()
            own.mul_(factor)
            decoder.model.get_parameter(name).mul_(factor)
    assert decode(decoder, EVEN) == [reference(model, prompt) for prompt in EVEN] != before


def test_a_parameter_that_moved_is_noticed() -> None:
    decoder = decoder_of(model_of("qwen2"))
    weight = decoder.model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    with pytest.raises(AssertionError, match="in place only"):
        decode(decoder, EVEN)


def test_parameters_stay_whole_under_their_names() -> None:
    model = model_of("llama with biases")
    decoder = decoder_of(model)
    for name, own in model.named_parameters():
        moved = decoder.model.get_parameter(name)
        assert moved.is_contiguous()
        assert torch.equal(moved, own)
    assert len({p.data_ptr() for p in decoder.model.parameters()}) == len(list(model.parameters()))


def test_bfloat16_is_as_near_to_exact_as_transformers() -> None:
    exact = model_of("qwen2")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact = copy.deepcopy(model).to(torch.float64)
    decoder = decoder_of(model)
    prompts = [prompt for prompt in EVEN + MIXED if len(prompt) > 1]
    errors = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        right = exact(ids).logits[0, -1]
        theirs = model(ids).logits[0, -1].double()
        seen: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "largest", lambda hidden, rows: seen.append(hidden) or np.zeros(len(hidden), int))  # noqa: B023
            decoder.run([prompt], [0], Sampling(1))
        ours = (torch.from_numpy(seen[0]).double() @ decoder.model.lm_head.weight.T.double())[0]
        errors.append([float((found - right).norm() / right.norm()) for found in (ours, theirs)])
    ours, theirs = np.mean(errors, axis=0)
    assert 0 < ours < theirs < 0.1


def test_samples_equal_those_of_the_plain_loop() -> None:
    model = model_of("qwen2")
    sampling = Sampling(NEW, temperature=1.0, top_p=0.9, seed=5)
    prompts = [EVEN[0]] * 3 + MIXED
    rows = decode(decoder_of(model), prompts, sampling)
    assert rows == decode(Decoder(copy.deepcopy(model), (), 0), prompts, sampling)
    assert len({tuple(row) for row in rows}) == len(rows), "equal prompts must differ"


@pytest.mark.parametrize("pieces", [(1024, 10**9), (7, 1500)])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_those_of_the_models_own_forward(
    name: str, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits = pieces
    monkeypatch.setattr(fused, "PREFILL_TOKENS", tokens)
    model = model_of(name)
    prompts = [*MIXED, *BRANCHING, MIXED[3]]
    completions = [random_prompts((length,))[0] for length in (5, 1, 7, 3, 3, 9, 2)] + [[5, 6, 7]] * 7
    found = decoder_of(model).score(prompts, completions, logits)
    expected = log_probabilities(model, prompts, completions, 10**9)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_weights_gone_astray_end_in_tokens_not_in_a_crash() -> None:
    model = build_model("qwen2", hidden_size=64, head_dim=32)
    for value in (math.nan, math.inf, 1e30):
        decoder = decoder_of(model)
        decoder.model.model.layers[1].mlp.down_proj.weight.fill_(value)
        rows = decode(decoder, MIXED)
        assert all(0 <= token < model.config.vocab_size for row in rows for token in row)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma", {}, "differ from Llama's"),
        ("mistral", {"sliding_window": 12}, "over a window"),
        ("qwen2", {"head_dim": 16}, "multiples of 16"),
        ("qwen2", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
    ],
)
def test_other_models_are_left_to_the_plain_loop(name: str, changes: dict[str, Any], reason: str) -> None:
    model = build_model(name, **{"hidden_size": 64, "head_dim": 32, **changes})
    assert reason in (unfusable(model) or "")


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(tokens, min_size=1, max_size=8))
def test_the_tree_of_any_prompts_is_whole(prompts: list[list[int]]) -> None:
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    assert all(prompt[:shared] == prompts[0][:shared] and len(prompt) > shared for prompt in prompts)
    tree = PromptTree.of(prompts, shared)
    beginnings = [tuple(prompts[row][: at + 1]) for row, at in zip(tree.nodes.rows, tree.nodes.positions, strict=True)]
    assert sorted(beginnings) == sorted({tuple(p[: n + 1]) for p in prompts for n in range(shared, len(p))})
    assert [begin[-1] for begin in beginnings] == tree.ids.tolist()
    number = {begin: node for node, begin in enumerate(beginnings)}
    assert all(number[begin[:-1]] < node for begin, node in number.items() if len(begin) > shared + 1)
    places = list(zip(tree.cached.tokens, tree.cached.rows, tree.cached.positions, strict=True))
    assert len(places) == sum(len(p) - shared for p in prompts) == len(set(places))
    assert all(number[tuple(prompts[row][: at + 1])] == node for node, row, at in places)
    assert sorted(tree.cached.tokens) == tree.cached.tokens.tolist()
    assert [beginnings[node] for node in tree.last] == [tuple(prompt) for prompt in prompts]
    assert tree.leaves.tolist() == sorted(set(tree.last))
