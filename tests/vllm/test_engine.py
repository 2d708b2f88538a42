"""Completions of vLLM against those of transformers, its prefix cache, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from estune.agents.play import Limits, Players
from estune.completion import Sampling
from estune.config import Config
from estune.engines.continuous import Batcher, Request
from estune.engines.prompts import PromptEncoder
from estune.engines.score import log_probabilities
from estune.engines.vllm import internals
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.grading.rollout import Opening, Rollout
from estune.weights.checkpoint import Checkpoint
from tests.vllm.pairs import PROMPTS, UPDATE, open_reference, open_weights, settings

GREEDY = Sampling(12)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_greedy_completions_are_those_of_transformers(
    kind: str, saved: Callable[..., Path], engines: Callable[..., Any]
) -> None:
    path = saved(kind)
    engine, (reference, theirs) = engines(path), open_reference(path, "float32")
    ours, seen = open_weights(engine, path), []
    for member in (Member(1), Member(2, -1)):
        ours.perturb(member, 0.02)
        theirs.perturb(member, 0.02)
        seen.append(engine.generate(PROMPTS, GREEDY))
        assert seen[-1] == reference.generate(PROMPTS, GREEDY)
    ours.restore()
    theirs.restore()
    assert engine.generate(PROMPTS, GREEDY) == reference.generate(PROMPTS, GREEDY)
    ours.apply(UPDATE)
    theirs.apply(UPDATE)
    ours.restore()
    theirs.restore()
    assert engine.generate(PROMPTS, GREEDY) == reference.generate(PROMPTS, GREEDY)
    assert len({completion.text for completion in seen[0]}) > len(PROMPTS) // 2
    assert seen[0] != seen[1]
    ours.load(Checkpoint(path))
    ours.restore()


def test_completions_end_where_those_of_transformers_do(saved: Any, engines: Any) -> None:
    """Every fourth token ends, so that many completions do."""
    path = saved("qwen3", eos_token_id=list(range(1, 330, 4)))
    engine, (reference, _) = engines(path), open_reference(path, "float32")
    assert engine.end_ids == reference.end_ids
    found = engine.generate(PROMPTS, GREEDY)
    assert found == reference.generate(PROMPTS, GREEDY)
    assert {completion.finished for completion in found} == {True, False}
    assert {len(completion.token_ids) for completion in found if completion.finished} > {1}


def test_without_the_reset_completions_would_be_stale(
    saved: Any, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("qwen2")
    engine, (reference, theirs) = engines(path), open_reference(path, "float32")
    ours = open_weights(engine, path)
    prompts = [[(7 * row + i) % 320 for i in range(70)] for row in range(16)]  # of two blocks, which are shared
    engine.generate(prompts, GREEDY)
    theirs.perturb(Member(8), 0.05)
    expected = reference.generate(prompts, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(internals, "reset_prefix_cache", lambda llm: True)
        ours.perturb(Member(8), 0.05)
        stale = engine.generate(prompts, GREEDY)
    assert sum(a != b for a, b in zip(stale, expected, strict=True)) > 8
    ours.perturb(Member(8), 0.05)
    assert engine.generate(prompts, GREEDY) == expected
    ours.restore()
    monkeypatch.setattr(internals, "reset_prefix_cache", lambda llm: False)
    with pytest.raises(EstuneError, match="keys and values of other weights"):
        ours.restore()


def test_sampled_completions_repeat_for_a_seed(saved: Any, engines: Any) -> None:
    engine = engines(saved("qwen3"))
    sampling = Sampling(10, temperature=1.0, top_p=0.9, top_k=50, seed=5)
    found = engine.generate([PROMPTS[0]] * 6, sampling)
    assert len({completion.text for completion in found}) > 3  # each row has random numbers of its own
    assert engine.generate([PROMPTS[0]] * 6, sampling) == found
    assert engine.generate([PROMPTS[0]] * 2, sampling) == found[:2]
    assert engine.generate([PROMPTS[0]] * 6, Sampling(10, temperature=1.0, top_p=0.9, top_k=50, seed=6)) != found


def test_completions_are_scored_as_by_transformers(saved: Any, engines: Any) -> None:
    """Perturbed weights too, though keys and values of the same rows under others have been kept."""
    path = saved("qwen2")
    engine, (reference, theirs) = engines(path), open_reference(path, "float32")
    ours = open_weights(engine, path)
    completions = [[(11 * row + i) % 330 for i in range(1 + row % 9)] for row in range(len(PROMPTS))]
    seen = []
    for member in (None, Member(6), Member(7, -1)):
        for weights in (ours, theirs):
            weights.restore() if member is None else weights.perturb(member, 0.05)
        seen.append(engine.score(PROMPTS, completions))
        expected = log_probabilities(reference.model, PROMPTS, completions, 10**6)
        for found, row, completion in zip(seen[-1], expected, completions, strict=True):
            assert len(found) == len(completion)
            assert found == pytest.approx(row, abs=1e-3)
    assert abs(seen[0][0][0] - seen[1][0][0]) > 0.01
    ours.restore()
    # To score a row vLLM needs room for a token more: of one that fills up the positions the last is left out.
    prompt, completion = [5] * 250, [9, 8, 7, 6, 5, 4]
    (found,) = engine.score([prompt], [completion])
    theirs.restore()
    (row,) = log_probabilities(reference.model, [prompt], [completion], 10**6)
    assert found == pytest.approx(row[:-1], abs=1e-3)


def test_prompts_that_do_not_fit_are_refused(saved: Any, engines: Any) -> None:
    engine = engines(saved("qwen3"))
    with pytest.raises(EstuneError, match="prompt 1: 250 tokens and max_new_tokens 12 go beyond the 256 positions"):
        engine.generate([[1], [2] * 250], GREEDY)
    with pytest.raises(EstuneError, match="prompt 0: token 330 is none of the 330"):
        engine.generate([[330]], GREEDY)
    assert engine.generate([], GREEDY) == []
    shorter = PromptEncoder("M", engine.tokenizer, engine.config, 64)
    with pytest.raises(
        EstuneError, match="60 tokens and max_new_tokens 12 go beyond the 64 .* to 73 or more, or lower"
    ):
        shorter.check([[1] * 60], GREEDY)


def test_a_layer_that_packs_its_weights_is_refused(saved: Any) -> None:
    command = [sys.executable, "-m", "tests.vllm.packed", saved("llama")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "refused: engine=vllm cannot train this model: vLLM has packed the weights of model.layers" in done.stdout


def test_a_length_without_room_is_refused_by_the_name_of_its_setting(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from estune.engines.vllm.engine import VllmEngine

    path = saved("llama")
    monkeypatch.setattr(VllmEngine, "cache_bytes", lambda *arguments: 1 << 17)
    with pytest.raises(EstuneError, match="vLLM cannot run model .* lower vllm_max_model_length"):
        VllmEngine(Checkpoint(path), Config(model=str(path), engine="vllm"))


def test_a_gpu_s_memory_is_divided(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB; a token's keys and values are 2 layers x 2 x 2 heads x 32 x 4 bytes."""
    from estune.engines.vllm import engine

    asked: list[dict[str, Any]] = []

    def start(path: Path, device: torch.device, parallel: int, **options: Any) -> Any:
        asked.append(options)
        raise EstuneError("asked")

    monkeypatch.setattr(internals, "start", start)
    monkeypatch.setattr(engine, "chosen_device", torch.device)
    monkeypatch.setattr(engine, "total_memory", lambda device: 80 << 30)
    path = saved("llama")

    def ask(base: int = 0, **settings: Any) -> tuple[Any, ...]:
        common = {"model": str(path), "engine": "vllm", "device": "cuda", "dtype": "float32", "max_new_tokens": 100}
        with pytest.raises(EstuneError, match="asked"):
            engine.VllmEngine(Checkpoint(path), Config(**common, vllm_max_model_length=256, **settings), base)
        names = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "block_size")
        return tuple(asked[-1][name] for name in names)

    full = (256 + 32) * 1024  # bytes of a sequence of the longest text, and of a block beside it
    assert ask() == (0.9, 256 * full, 256, None)
    assert ask(8 << 30, workers=2, workers_per_gpu=2) == (pytest.approx(0.45 - 0.1), 256 * full, 256, None)
    assert ask(prompts_per_step=5000)[1:3] == (1024 * full, 1024)
    assert ask(batch_size=7)[1:3] == (7 * full, 7)
    assert ask(vllm_gpu_memory_utilization=0.05)[:2] == (0.05, None)  # 4 GiB: no room to spare, so it is measured
    with pytest.raises(EstuneError, match="takes 80.0 GiB of the GPU, which leaves nothing for vLLM; set base_device"):
        engine.VllmEngine(Checkpoint(path), Config(model=str(path), engine="vllm", device="cuda"), 80 << 30)


def test_a_gpu_that_others_use_is_no_reason_for_another_engine(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from estune.engines.vllm.engine import VllmEngine

    def start(*arguments: Any, **options: Any) -> Any:  # in the words of vllm/v1/worker/utils.py, `request_memory`
        raise ValueError(
            "Free memory on device cuda:0 (10.0/79.2 GiB) on startup is less than desired GPU memory utilization (0.9, "
            "71.3 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
        )

    monkeypatch.setattr(internals, "start", start)
    path = saved("llama")
    with pytest.raises(EstuneError, match="; end what else uses the GPU or lower vllm_gpu_memory_utilization$"):
        VllmEngine(Checkpoint(path), Config(model=str(path), engine="vllm"))


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, saved: Any, engines: Any) -> None:
    assert internals.check_version()
    monkeypatch.setattr(internals, "installed", lambda package: "0.40.1" if package == "vllm" else None)
    with pytest.raises(EstuneError, match=r"vLLM 0.40.1 is installed, estune knows 0.25 up to, not including, 0.34"):
        internals.check_version()
    monkeypatch.setattr(internals, "installed", lambda package: None)
    with pytest.raises(EstuneError, match=r"vLLM is not installed; pip install 'estune\[vllm\]'"):
        internals.check_version()


def test_an_engine_in_another_process_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    monkeypatch.setenv(name, "1")
    internals.prepare()
    internals.prepare()
    assert os.environ[name] == "0"
    assert caplog.messages == [f"{name}=1: vLLM's engine has to be in this process, so it is taken for 0"]


def test_settings_reach_vllm(saved: Any, engines: Any) -> None:
    path = saved("qwen3")
    engine = engines(path)
    config = engine.llm.llm_engine.vllm_config
    assert config.scheduler_config.max_num_seqs == 32
    assert config.model_config.max_model_len == 256
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.kv_cache_memory_bytes < 64 << 20
    assert settings(engine, path).gpus_per_worker == 1


def test_rollouts_are_played(saved: Callable[..., Path], engines: Callable[..., Any]) -> None:
    path = saved("qwen2")
    engine = engines(path)
    reference, _ = open_reference(path, "float32")
    opening = Opening(engine.encode(["Hello"])[0], Rollout("environment", Twice, chat=False), {"prompt": "Hello"})
    (found,) = Players(engine, engine, Limits()).play([opening], GREEDY)
    (first,) = reference.generate(reference.encode(["Hello"]), GREEDY)
    (second,) = reference.generate(reference.encode([f"Hello{first.text} and"]), GREEDY)
    assert (found.text, found.token_ids) == (second.text, first.token_ids + second.token_ids)


class Twice:
    """Two turns over a text."""

    def __init__(self) -> None:
        self.turns = 0

    def reset(self, row: dict[str, Any]) -> str:
        return str(row["prompt"])

    def step(self, completion: str) -> Any:
        self.turns += 1
        return 1.0 if self.turns == 2 else " and"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_join_and_leave_at_any_token(
    saved: Callable[..., Path], engines: Callable[..., Any], temperature: float
) -> None:
    """Each gets what it gets alone; a long one neither holds up the short, nor those that come meanwhile."""
    engine = engines(saved("qwen2"))
    prompts = [[5 + n, 6, 7 + n] for n in range(6)]

    def drawn(number: int) -> Sampling:
        return Sampling(3 + 4 * number, temperature=temperature, seed=number)

    expected = [engine.generate([prompt], drawn(number))[0] for number, prompt in enumerate(prompts)]
    endless: list[Any] = []
    ended: list[int] = []
    with Batcher(engine) as batcher:
        endless.append(batcher.submit(Request([9, 9], Sampling(200), told=lambda text: ended.append(-1))))
        futures = []
        for number, prompt in enumerate(prompts):
            futures.append(batcher.submit(Request(prompt, drawn(number))))
            futures[-1].add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
            if number % 2:
                futures[number // 2].result()
        assert [future.result() for future in futures] == expected
        endless[0].cancel()
    engine.forget()  # which vLLM refuses while it decodes anything
    assert engine.generate([prompts[0]], drawn(0)) == expected[:1]


def test_a_batch_that_is_closed_leaves_nothing_behind(saved: Callable[..., Path], engines: Callable[..., Any]) -> None:
    engine = engines(saved("qwen2"))
    begun = threading.Event()
    with Batcher(engine) as batcher:
        left = batcher.submit(Request([5, 6], Sampling(200), told=lambda text: begun.set()))
        begun.wait(20)
    assert left.cancelled()
    engine.forget()
