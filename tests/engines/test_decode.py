"""Our decode loop against transformers' `generate`, token for token."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from estune.completion import Sampling
from estune.engines.decode import Decoder, unsupported
from estune.engines.generate import GenerateDecoder
from estune.engines.progress import OWN, Progress
from estune.engines.sampling import choose, truncate, uniform
from tests.models import ARCHITECTURES, RECURRENT, build_model

NEW = 20
PLAIN = [name for name in ARCHITECTURES if name not in {*RECURRENT, "phi3_longrope", "gpt_neox", "qwen3_moe"}]


def random_prompts(lengths: tuple[int, ...], prefix: int = 0, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    head = [chooser.randrange(6, 260) for _ in range(prefix)]
    return [head + [chooser.randrange(6, 260) for _ in range(length)] for length in lengths]


MIXED = random_prompts((1, 3, 9, 9, 16, 22, 30))
PREFIXED = random_prompts((2, 2, 5, 14), prefix=11)
EVEN = random_prompts((13, 13, 13, 13))


def unchanged(model: Any) -> Any:
    """A model whose weights stay as they are: `reference` may remember its completions."""
    model.completions = {}
    return model


@functools.cache
def model_of(name: str) -> Any:
    return unchanged(build_model(name))


def decoder_of(model: Any, end_ids: Sequence[int] = ()) -> Decoder:
    """A decoder of a copy, so that `model` keeps PyTorch's attention and can be the judge."""
    return Decoder(copy.deepcopy(model), end_ids, 0)


def reference(model: Any, prompt: list[int], new: int = NEW, end_ids: tuple[int, ...] = ()) -> list[int]:
    """One prompt alone through `generate`: no batch, no padding."""
    known: dict[Any, list[int]] = getattr(model, "completions", {})
    asked = (model.device.type, tuple(prompt), new, end_ids)
    if asked not in known:
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=list(end_ids), pad_token_id=0)
        ids = torch.tensor([prompt], device=model.device)
        row = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        known[asked] = row[len(prompt) :].tolist()
    return list(known[asked])


def decode(decoder: Any, prompts: list[list[int]], sampling: Sampling | None = None) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = decoder.run([prompts[i] for i in order], order, sampling or Sampling(NEW)).tolist()
    found: list[list[int]] = [[] for _ in prompts]
    for i, row in zip(order, rows, strict=True):
        found[i] = row
    return found


def cut(rows: list[list[int]], end_ids: tuple[int, ...]) -> list[list[int]]:
    return [row[: next((i + 1 for i, token in enumerate(row) if token in end_ids), len(row))] for row in rows]


def assert_counted(done: Progress, prompts: list[list[int]], completions: list[list[int]], late: int = 0) -> None:
    """All has been counted, a row's end at most so many steps late."""
    tokens = sum(map(len, completions))
    assert done.read == sum(map(len, prompts))
    assert done.settled == len(prompts) * NEW
    assert tokens <= done.tokens <= tokens + late * len(prompts)
    assert min(done.reading, done.writing) > 0


@pytest.mark.parametrize("name", PLAIN)
def test_completions_equal_generate(name: str) -> None:
    model = model_of(name)
    assert unsupported(model) is None
    decoder = decoder_of(model)
    # Sliding windows of 12 and 16 are shorter than most of these, padded and not, with and without a shared prefix.
    for prompts in (MIXED, PREFIXED, EVEN):
        expected = [reference(model, prompt) for prompt in prompts]
        assert sum(len(set(row)) for row in expected) > 8 * len(expected), "completions too dull to tell a mistake"
        assert decode(decoder, prompts) == expected


def test_equal_prompts_and_prompts_that_begin_others() -> None:
    model = model_of("qwen2")
    decoder = decoder_of(model)
    for prompts in ([EVEN[0]] * 3, [EVEN[0][:5], EVEN[0][:6], EVEN[0]], [EVEN[0][:1]] * 2):
        assert decode(decoder, prompts) == [reference(model, prompt) for prompt in prompts]


def test_prefill_in_small_pieces_equals_generate() -> None:
    model = model_of("qwen2")
    decoder = decoder_of(model)
    for tokens in (1, 24, 60):
        decoder.prefill_tokens = tokens
        for prompts in (MIXED, PREFIXED, EVEN):
            assert decode(decoder, prompts) == [reference(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
@pytest.mark.parametrize("check_every", [1, 4])
def test_rows_that_end_leave_the_batch(name: str, check_every: int) -> None:
    model = model_of(name)
    plain = [reference(model, prompt) for prompt in MIXED]
    # Ends that occur at several places of several rows; some rows never end.
    end_ids = (plain[0][4], plain[2][9], plain[3][0], plain[5][14])
    expected = [reference(model, prompt, end_ids=end_ids) for prompt in MIXED]
    assert len({len(row) for row in expected}) > 3
    decoder = decoder_of(model, end_ids)
    decoder.check_every = check_every
    seen: list[int] = []
    forward = decoder.forward
    decoder.forward = lambda ids, *rest: (seen.append(len(ids)), forward(ids, *rest))[1]  # type: ignore[method-assign]
    before = OWN.now()
    assert cut(decode(decoder, MIXED), end_ids) == expected
    assert seen[-1] < len(MIXED)
    assert_counted(OWN.now().since(before), MIXED, expected, late=check_every - 1)


def test_decoding_stops_when_all_rows_have_ended() -> None:
    model = model_of("qwen2")
    end_ids = tuple({reference(model, prompt)[2] for prompt in EVEN})
    decoder = decoder_of(model, end_ids)
    steps: list[int] = []
    forward = decoder.forward
    decoder.forward = lambda *call: (steps.append(1), forward(*call))[1]  # type: ignore[method-assign]
    assert cut(decode(decoder, EVEN), end_ids) == [reference(model, prompt, end_ids=end_ids) for prompt in EVEN]
    assert len(steps) <= 3


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("piece", [1024, 24])
def test_nothing_of_earlier_calls_is_read(name: str, piece: int) -> None:
    model = model_of(name)
    end_id = reference(model, MIXED[4])[5]
    decoder = decoder_of(model, [end_id])
    decoder.prefill_tokens = piece
    first = [cut(decode(decoder, prompts), (end_id,)) for prompts in (MIXED, PREFIXED, EVEN)]
    buffers = dict(decoder.cache.storage)
    for prompts, expected in zip((MIXED, PREFIXED, EVEN), first, strict=True):
        with torch.inference_mode():
            for buffer in decoder.cache.storage.values():
                buffer.fill_(float("nan"))
        assert cut(decode(decoder, prompts), (end_id,)) == expected
    assert all(decoder.cache.storage[key] is buffer for key, buffer in buffers.items()), "storage was allocated anew"


def test_weights_changed_in_place_are_used() -> None:
    model = build_model("qwen2")
    decoder = decoder_of(model)
    before = decode(decoder, EVEN)
    for changed in (model, decoder.model):
        changed.model.layers[0].mlp.up_proj.weight.mul_(-0.7)
    after = decode(decoder, EVEN)
    assert after == [reference(model, prompt) for prompt in EVEN]
    assert after != before
    decoder.model.model.layers[0].mlp.up_proj.weight.copy_(build_model("qwen2").model.layers[0].mlp.up_proj.weight)
    assert decode(decoder, EVEN) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_runs_and_repeats(name: str) -> None:
    model = build_model(name).to(torch.bfloat16)
    decoder = decoder_of(model)
    first = decode(decoder, MIXED)
    assert decode(decoder, MIXED) == first
    # Rounding may turn a close call in a long completion, not all first tokens.
    assert [row[0] for row in first] == [reference(model, prompt, new=1)[0] for prompt in MIXED]


@pytest.mark.parametrize("name", sorted(RECURRENT))
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_unusual_caches_go_through_generate(name: str) -> None:
    model = model_of(name)
    assert unsupported(model)
    end_id = reference(model, EVEN[1])[7]
    decoder = GenerateDecoder(model, [end_id], 0)
    expected = [reference(model, prompt, end_ids=(end_id,)) for prompt in EVEN]
    assert len(expected[1]) <= 8
    batches = [[prompt] for prompt in EVEN] if decoder.single else [EVEN]
    assert cut([row for batch in batches for row in decode(decoder, batch)], (end_id,)) == expected


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    rows = torch.arange(20_000)
    first, second, other = uniform(1, rows, 0), uniform(1, rows, 1), uniform(2, rows, 0)
    assert 0 < float(first.min()) < float(first.max()) < 1
    assert torch.histc(first, 20, 0, 1).sub(1000).abs().max() < 160  # 5 standard deviations
    for unlike in (second, other, first.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([first, unlike]))[0, 1])) < 0.035
    assert uniform(1 << 33, rows[:8], 0).tolist() != uniform(0, rows[:8], 0).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 1.0),
        Sampling(1, 0.7),
        Sampling(1, 1.0, top_k=5),
        Sampling(1, 1.3, top_p=0.8),
        Sampling(1, 1.0, 0.9, 6),
    ],
)
def test_sampled_frequencies_fit_the_distribution(sampling: Sampling) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    scaled = (logits / sampling.temperature).double()
    if sampling.top_k:
        scaled[scaled < scaled.sort(descending=True).values[sampling.top_k - 1]] = -torch.inf
    if sampling.top_p < 1:
        mass, order = scaled.softmax(0).sort(descending=True)
        inside = int((mass.cumsum(0) < sampling.top_p).sum()) + 1
        scaled[order[inside:]] = -torch.inf
    probability = scaled.softmax(0)
    draws = 40_000
    tokens = choose(logits.expand(draws, -1), sampling, torch.arange(draws), 0)
    counts = torch.bincount(tokens, minlength=12).double()
    assert (counts[probability == 0] == 0).all()
    expected = draws * probability[probability > 0]
    statistic = float(((counts[probability > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_top_p_keeps_at_least_one_token() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    assert truncate(logits, 0, 1e-6).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_samples_depend_on_seed_prompt_and_position_alone() -> None:
    model = model_of("qwen2")
    decoder = decoder_of(model)
    sampling = Sampling(NEW, temperature=1.0, seed=5)
    prompts = [EVEN[0]] * 3 + EVEN[1:]
    rows = decode(decoder, prompts, sampling)
    assert decode(decoder, prompts, sampling) == rows
    assert len({tuple(row) for row in rows}) == len(rows), "equal prompts must differ"
    apart = [decoder.run([prompts[i]], [i], sampling)[0].tolist() for i in reversed(range(len(prompts)))]
    assert apart[::-1] == rows
    assert decode(decoder, prompts, Sampling(NEW, temperature=1.0, seed=6)) != rows
    end_id = rows[1][5]
    ending = decoder_of(model, [end_id])
    assert cut(decode(ending, prompts, sampling), (end_id,)) == cut(rows, (end_id,)), (
        "rows that left took numbers along"
    )
    through_generate = GenerateDecoder(model, [], 0).run(prompts, range(len(prompts)), sampling).tolist()
    assert through_generate == rows
