"""Prompts that join and leave a batch, against the same prompts alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.completion import Completion, Sampling
from estune.engines.continuous import Batcher, Request
from estune.engines.cpu.rows import FusedRows
from estune.engines.progress import OWN
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.models import save_model

SAMPLING = Sampling(12)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """One whose rows join at any token, and one that decodes in rounds."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, request.param, hidden_size=64, head_dim=32)
    return TransformersEngine(folder)


@pytest.fixture
def batcher(engine: TransformersEngine) -> Iterator[Batcher]:
    with Batcher(engine) as batcher:
        yield batcher


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(engine: TransformersEngine, prompt: list[int], sampling: Sampling) -> Completion:
    return engine.generate([prompt], sampling)[0]


@settings(max_examples=10)
@given(data=st.data())
def test_whoever_shares_the_batch_a_completion_is_the_same(data: st.DataObject, engine: TransformersEngine) -> None:
    """Conversations of several turns, sent by a thread each; turns begin with all that came before."""
    count = data.draw(st.integers(1, 12))
    begin = ids_of(data.draw(st.integers(1, 40)), 1)
    turns = [data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3)) for _ in range(count)]
    hot = data.draw(st.booleans())
    sampling = Sampling(9, temperature=1.0, top_p=0.9) if hot else Sampling(9)
    asked: list[tuple[list[int], Sampling, list[int]]] = []

    def converse(batcher: Batcher, number: int) -> None:
        prompt = list(begin)
        for turn, length in enumerate(turns[number]):
            prompt = [*prompt, *ids_of(length, 100 * number + turn)]
            drawn = replace(sampling, seed=number, max_new_tokens=3 + (number + turn) % 7)
            found = batcher.submit(Request(prompt, drawn)).result().token_ids
            asked.append((prompt, drawn, found))
            prompt = [*prompt, *found]

    with Batcher(engine) as batcher:
        threads = [threading.Thread(target=converse, args=(batcher, number)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(asked) == sum(map(len, turns))
    for prompt, drawn, found in asked:
        assert found == alone(engine, prompt, drawn).token_ids


def test_what_was_decoded_before_is_not_computed_again(engine: TransformersEngine) -> None:
    if not isinstance(engine.open_rows(), FusedRows):
        return  # rounds keep nothing
    prompt = ids_of(100, 1)
    other = ids_of(90, 3)
    alike = [[*other, *ids_of(5, n)] for n in range(4)]
    expected = [alone(engine, each, SAMPLING).token_ids for each in alike]
    with Batcher(engine) as batcher:
        first = batcher.submit(Request(prompt, SAMPLING)).result()
        before = OWN.now()
        batcher.submit(Request([*prompt, *first.token_ids, *ids_of(7, 2)], SAMPLING)).result()
        assert OWN.now().since(before).read <= 8
        # Of four that begin alike and come together, one computes what they have in common.
        before = OWN.now()
        batcher.expect(4)
        asked = [batcher.submit(Request(each, SAMPLING, expected=True)) for each in alike]
        assert [future.result().token_ids for future in asked] == expected
        assert OWN.now().since(before).read < 90 + 4 * 6
    with Batcher(engine) as batcher:  # other weights may have come
        before = OWN.now()
        batcher.submit(Request(prompt, SAMPLING)).result()
        assert OWN.now().since(before).read >= 99


def test_a_completion_ends_at_a_stop_and_tells_of_itself(engine: TransformersEngine, batcher: Batcher) -> None:
    prompt = ids_of(9, 5)
    whole = alone(engine, prompt, SAMPLING)
    stop = whole.text[len(whole.text) // 2 :][:2]
    heard: list[str] = []
    found = batcher.submit(Request(prompt, SAMPLING, ("never", stop), heard.append)).result()
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finished
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert all(found.text.startswith(part) for part in heard)
    assert not found.text or heard[-1] == found.text


def test_one_that_nobody_waits_for_makes_room(engine: TransformersEngine, batcher: Batcher) -> None:
    asked = batcher.submit(Request(ids_of(3, 1), Sampling(200)))
    asked.cancel()
    found = batcher.submit(Request(ids_of(4, 1), SAMPLING)).result()
    assert found.token_ids == alone(engine, ids_of(4, 1), SAMPLING).token_ids


def test_what_cannot_be_completed_is_refused_at_once(engine: TransformersEngine, batcher: Batcher) -> None:
    with pytest.raises(EstuneError, match="go beyond the 256 positions"):
        batcher.submit(Request(ids_of(250, 1), SAMPLING))
    with pytest.raises(EstuneError, match="no tokens"):
        batcher.submit(Request([], SAMPLING))


def test_closed_it_leaves_nobody_waiting(engine: TransformersEngine) -> None:
    batcher = Batcher(engine)
    begun = threading.Event()
    asked: list[Future[Completion]] = [
        batcher.submit(Request(ids_of(3, n), Sampling(250), told=lambda text: begun.set())) for n in range(3)
    ]
    begun.wait(20)
    batcher.close()
    for future in asked:
        if not future.done() or future.cancelled():
            with pytest.raises(CancelledError):
                future.result(5)
    with pytest.raises(EstuneError, match="no longer served"):
        batcher.submit(Request(ids_of(3, 1), SAMPLING))


def test_an_engine_that_fails_tells_all_who_wait(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        most_idle = None

        def join(self, request: Request) -> int | None:
            return 1

        def step(self) -> Any:
            raise RuntimeError("burnt out")

    monkeypatch.setattr(engine, "open_rows", Broken)
    with Batcher(engine) as batcher:
        with pytest.raises(RuntimeError, match="burnt out"):
            batcher.submit(Request(ids_of(3, 1), SAMPLING)).result()
        with pytest.raises(EstuneError, match="the engine has failed: burnt out"):
            batcher.submit(Request(ids_of(3, 1), SAMPLING))
