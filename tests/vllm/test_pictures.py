"""Pictures through vLLM: prompts, scores, caches and a run, against transformers. All of it by one engine.

The model is an Idefics 3: what vLLM has for LLaVA, Gemma 3 and Qwen's needs torchvision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Picture, Pictured, Sampling
from estune.engines.continuous import Request
from estune.engines.vllm import internals
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.weights import VllmWeights
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.trainer import Trainer
from estune.tasks.base import Task
from tests.runs import make_config, make_task, substance
from tests.visions import picture, png, save_vision
from tests.vllm.conftest import SHAPE
from tests.vllm.pairs import open_reference

pytestmark = pytest.mark.usefixtures("alone_here")
GREEDY = Sampling(8)
SETTINGS: dict[str, Any] = {"train_parameters": "*", "steps": 2, "prompts_per_step": 4, "dtype": "float32"}


def make_pictured() -> Task:
    """A task whose rows have a picture each."""
    rows = [{"prompt": "How many?", "image": picture(n, n)} for n in range(1, 9)]
    return replace(make_task(), train=rows[2:], evaluation=rows[:2])


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {name: size for name, size in SHAPE.items() if name != "vocab_size"}
    return save_vision(tmp_path_factory.mktemp("models") / "idefics3", "idefics3", **shape)


@pytest.fixture(scope="module")
def training(seer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A run of all parameters on pictures, about to begin."""
    vllm = {"engine": "vllm", "replicas": None, "batch_size": 16, "device": "cpu", "threads": 1}
    config = make_config(tmp_path_factory.mktemp("run") / "run", seer, **SETTINGS, **vllm)
    found = Trainer(config, task=make_pictured(), monitors=[])
    yield found
    found.close()


@pytest.fixture
def ours(training: Trainer) -> Iterator[tuple[VllmEngine, VllmWeights]]:
    """vLLM's engine and weights, which are the base's again afterwards."""
    own = training.pool.own
    yield own.engine, own.weights
    own.weights.restore()


@pytest.fixture(scope="module")
def theirs(seer: Path) -> Any:
    """The same in transformers."""
    return open_reference(seer, "float32")


def ask(text: str, *counts: int) -> Any:
    parts = [{"type": "image", "image": Picture(png(picture(count, count)))} for count in counts]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prompts() -> list[Any]:
    """Of no picture, one and several, whose beginnings some share."""
    shown = [ask("How many?", count) for count in range(1, 7)]
    return [*shown, ask("Are these alike?", 1, 2), ask("Are these?", 1, 2, 9), ask("How many?"), "a text alone"]


def assert_alike(one: list[list[float]], other: list[list[float]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_completions_and_scores_are_those_of_transformers(ours: Any, theirs: Any) -> None:
    (engine, weights), (reference, same) = ours, theirs
    ids = engine.encode(prompts())
    assert ids == reference.encode(prompts())
    seen = []
    for member in (None, Member(1), Member(2, -1)):
        for each in (weights, same):
            each.restore() if member is None else each.perturb(member, 0.02)
        found = engine.generate(ids, GREEDY)
        assert found == reference.generate(ids, GREEDY)
        scores = engine.score(ids, [completion.token_ids for completion in found])
        assert_alike(scores, reference.score(ids, [completion.token_ids for completion in found]))
        seen.append(found)
    assert seen[0] != seen[1] != seen[2]
    assert len({completion.text for completion in seen[0][:6]}) > 1  # the pictures count
    # A token that stands for pictures, written by the model itself, stands for none.
    mark = ids[0][len(ids[0]) // 2]
    assert len(engine.score(ids[:1], [[77, mark, 78]])[0]) == 3


def test_a_prompt_joins_others_under_way(ours: Any) -> None:
    engine, _ = ours
    ids = engine.encode(prompts())
    rows = engine.open_rows()
    names = {rows.join(Request(prompt, GREEDY)): number for number, prompt in enumerate(ids)}
    gained: dict[int, list[int]] = {number: [] for number in names.values()}
    while any(len(tokens) < GREEDY.max_new_tokens for tokens in gained.values()):
        for name, tokens in rows.step():
            gained[names[name]] += tokens
    assert [gained[i] for i in range(len(ids))] == [found.token_ids for found in engine.generate(ids, GREEDY)]


def test_what_it_has_made_of_pictures_is_forgotten_with_the_weights(
    ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine, weights), (reference, same) = ours, theirs
    ids = engine.encode([ask("How many?", count) for count in (3, 4)])
    completions = [[77, 78, 79]] * 2
    eye = [name for name in weights.tensors if "vision_model" in name]
    assert eye
    weights.restore()
    before = engine.score(ids, completions)
    weights.perturb(Member(5), 0.05)
    same.perturb(Member(5), 0.05)
    expected = reference.score(ids, completions)
    assert_alike(engine.score(ids, completions), expected)
    weights.restore()
    assert_alike(engine.score(ids, completions), before)
    with monkeypatch.context() as patch:
        patch.setattr(internals, "reset_encoder_cache", lambda llm: None)
        weights.perturb(Member(5), 0.05)
        stale = engine.score(ids, completions)
    assert max(abs(a - b) for a, b in zip(stale[0], expected[0], strict=True)) > 0.01


def test_weights_are_those_of_transformers(ours: Any, theirs: Any, seer: Path) -> None:
    (_, weights), (_, same) = ours, theirs
    assert weights.tensors == same.tensors
    assert weights.fingerprint() == same.fingerprint()


def test_a_prompt_that_vllm_reads_otherwise_is_refused(ours: Any) -> None:
    engine, _ = ours
    (ids,) = engine.encode([ask("How many?", 3)])
    other = Pictured([*ids[:-1], 77], ids.text, ids.pictures, ids.marked)
    with pytest.raises(EstuneError, match=r"vLLM reads a prompt with pictures as \d+ tokens that are not the model's"):
        engine.generate([ids, other], GREEDY)
    engine.forget()  # nothing is under way
    assert engine.generate([ids], GREEDY)


def test_a_run_is_that_of_the_transformers_engine_and_replayed_to_the_bit(
    training: Trainer, seer: Path, tmp_path: Path
) -> None:
    """The last one here, as the engine ends with the run. In float32 no two tokens are all but equally likely."""
    assert training.train().ended == "finished"
    run = Path(training.config.output_dir)
    journal = Journal.read(run)
    assert any("vision_model" in name for name in journal.header.tensors)
    assert all(max(record.rewards) > min(record.rewards) for record in journal.steps)
    Trainer(make_config(tmp_path / "run", seer, **SETTINGS), task=make_pictured(), monitors=[]).train()
    other = Journal.read(tmp_path / "run")
    assert [substance(record) for record in journal.steps] == [substance(record) for record in other.steps]
    for record, expected in zip(journal.evaluations, other.evaluations, strict=True):
        assert record.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-6)
    assert replay(run, tmp_path / "replayed") == journal.fingerprint()
    replayed = (tmp_path / "replayed" / "model.safetensors").read_bytes()
    assert (run / "final" / "model.safetensors").read_bytes() == replayed
