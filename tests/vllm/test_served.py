"""`vllm serve` as a worker over HTTP, as a user starts it; and what it serves, swapped in place.

That servers may be killed, refused and lost is tested with lighter ones in `tests/pool/test_remote.py`, and with vLLM's
by `bench.faults.servers`.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import estune
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.remote.handle import KEY
from estune.run.trainer import Trainer
from tests.pool.test_remote_rollouts import played
from tests.runs import make_config, make_task, substance
from tests.servers import Served, serve_vllm

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = serve_vllm(tiny, tmp_path_factory.mktemp("server"), key="its key")
    found.wait()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def ours(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by the transformers engine."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    Trainer(make_config(folder, tiny, steps=2), task=make_task(), monitors=[]).train()
    return folder


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "its key")


def ask(url: str, path: str, body: dict[str, Any], key: str = "its key") -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=120))


def answer(server: Served, tiny: Path, tokens: int = 12) -> list[int]:
    """What anybody gets of the server by its ordinary endpoint."""
    body = {"model": str(tiny), "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    found: list[int] = ask(server.url, "/v1/completions", {**body, "ignore_eos": True})["choices"][0]["token_ids"]
    return found


def expected(model: Path, tokens: int = 12) -> list[int]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    found = loaded.generate(
        torch.tensor([PROMPT]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in found[0, len(PROMPT) :]]


def test_it_trains_the_run_of_the_transformers_engine(server: Served, tiny: Path, tmp_path: Path, ours: Path) -> None:
    """In float32, where no two tokens of these completions are all but equally likely."""
    config = make_config(tmp_path / "run", tiny, steps=2, replicas=None, workers_at=server.url)
    training = Trainer(config, task=make_task(), monitors=[])
    assert training.config.engine == "vllm"
    training.train()
    found, theirs = Journal.read(tmp_path / "run"), Journal.read(ours)
    assert [substance(record) for record in found.steps] == [substance(record) for record in theirs.steps]
    for record, other in zip(found.evaluations, theirs.evaluations, strict=True):
        assert record.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-6)
    assert replay(tmp_path / "run", tmp_path / "replayed") == theirs.fingerprint()


def test_rollouts_of_the_transformers_engine(server: Served, tiny: Path, tmp_path: Path) -> None:
    """Played here, their turns completed there, greedily."""
    task = played()
    Trainer(make_config(tmp_path / "near", tiny, steps=2), task=task, monitors=[]).train()
    config = make_config(tmp_path / "far", tiny, steps=2, replicas=None, workers_at=server.url)
    Trainer(config, task=task, monitors=[]).train()
    near, far = Journal.read(tmp_path / "near"), Journal.read(tmp_path / "far")
    assert [substance(record) for record in far.steps] == [substance(record) for record in near.steps]
    assert near.steps[0].metrics["said"] == far.steps[0].metrics["said"] > 1


def test_what_anybody_asks_is_answered_by_the_step_that_was_swapped_in(
    server: Served, tiny: Path, ours: Path, tmp_path: Path
) -> None:
    """Others' requests that are under way come to their ends with the weights that they began with."""
    replay(ours, tmp_path / "step-2", 2)
    estune.swap(server.url, ours, 0)
    before, after = answer(server, tiny), expected(tmp_path / "step-2")
    assert before == expected(tiny) != after
    long: list[list[int]] = []
    asking = threading.Thread(target=lambda: long.append(answer(server, tiny, 200)))
    asking.start()
    assert estune.swap(server.url, ours, 2).how in ("advanced", "kept")
    asking.join()
    assert answer(server, tiny) == after
    assert long[0][:12] in (before, after)  # whichever came first
    assert long == [expected(tiny, 200)] or long == [expected(tmp_path / "step-2", 200)]
    assert estune.swap(server.url, ours, 0).how == "kept"
    assert answer(server, tiny) == before


def test_its_routes_ask_for_its_key(server: Served) -> None:
    for path in ("/v1/estune/open", "/v1/estune/apply"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server.url, path, {}, key="another")
    with pytest.raises(urllib.error.HTTPError, match="404"):  # vLLM's own, which ask for none
        ask(server.url, "/update_weights", {})


@pytest.mark.usefixtures("alone_here")
def test_an_engine_of_this_process_is_swapped_too(tiny: Path, ours: Path, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    from estune.engines.vllm.plugin import register

    register()
    options: dict[str, Any] = {"dtype": "float32", "block_size": 32, "max_num_seqs": 8, "enforce_eager": True}
    options |= {"kv_cache_memory_bytes": 50_000_000, "max_model_len": 128, "skip_tokenizer_init": True}
    llm = LLM(str(tiny), weight_transfer_config={"backend": "estune"}, **options)
    try:
        settings = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False)

        def found() -> list[int]:
            return list(llm.generate({"prompt_token_ids": PROMPT}, settings, use_tqdm=False)[0].outputs[0].token_ids)

        before = found()
        assert estune.swap(llm, ours).fingerprint == Journal.read(ours).fingerprint()
        replay(ours, tmp_path / "replayed")
        assert found() == expected(tmp_path / "replayed") != before
        assert estune.swap(llm, ours, 0).how == "kept"
        assert found() == before

        def send(seeds: dict[str, Any]) -> list[int]:
            """By vLLM's own calls for weight transfer."""
            llm.collective_rpc("start_weight_update")
            llm.collective_rpc("update_weights", kwargs={"update_info": seeds})
            llm.collective_rpc("finish_weight_update")
            llm.reset_prefix_cache()
            return found()

        assert send({"seed": 5, "sigma": 0.05}) != before
        assert send({}) == before
        assert send({"pairs": [[5, 0.05]]}) != before
        assert send({"pairs": [[5, -0.05]]}) == before  # but for rounding of the float32 base
    finally:
        llm.llm_engine.engine_core.shutdown()
