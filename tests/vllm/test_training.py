"""Training with engine=vllm: replayed, resumed, by workers on Ray and with a model in two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from estune.completion import Sampling
from estune.config import Config
from estune.engines.vllm import internals
from estune.engines.vllm.open import open_vllm
from estune.es.strategy import Member
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.open import with_length
from estune.pool.ray.cluster import disconnect
from estune.run.monitors.base import Monitor
from estune.run.trainer import Trainer
from estune.study.probe import probe
from estune.weights.checkpoint import Checkpoint
from tests.processes import alive, until
from tests.runs import assert_same_run, make_config, make_task, substance
from tests.vllm.pairs import PROMPTS, UPDATE

pytestmark = pytest.mark.usefixtures("alone_here")


def descendants(parent: int) -> set[int]:
    """All processes that a process has started, and those that they have, but for Python's own resource tracker.

    That one ends with the process.
    """
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
            command = file.with_name("cmdline").read_bytes()
        except OSError:  # ended in the meantime
            continue
        if fields[0] != "Z" and b"resource_tracker" not in command:
            parents[int(file.parent.name)] = int(fields[1])
    found, new = set(), {parent}
    while new:
        new = {pid for pid, its in parents.items() if its in new} - found
        found |= new
    return found


class Census(Monitor):
    """Counts the processes there are after each step, and fails at one if it is to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.seen: set[int] = set()

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.seen |= descendants(os.getpid())
        if metrics["step"] == self.fail_at:
            raise RuntimeError("the monitor's own")


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


def trainer(output: Path, model: Path, *monitors: Monitor, **changes: Any) -> Trainer:
    settings = {"engine": "vllm", "replicas": None, "batch_size": 16, "steps": 4, "device": "cpu", "threads": 1}
    return Trainer(make_config(output, model, **{**settings, **changes}), task=make_task(), monitors=list(monitors))


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one engine in this process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    summary = trainer(folder, tiny).train()
    assert (summary.steps, summary.ended) == (4, "finished")
    return folder


def test_replay_gives_the_trained_weights(alone: Path, tmp_path: Path) -> None:
    journal = Journal.read(alone)
    assert all(max(record.rewards) > min(record.rewards) for record in journal.steps)
    assert replay(alone, tmp_path / "replayed") == journal.fingerprint()
    replayed = (tmp_path / "replayed" / "model.safetensors").read_bytes()
    assert (alone / "final" / "model.safetensors").read_bytes() == replayed
    best = max(journal.evaluations, key=lambda e: (e.metrics["eval_accuracy"], e.metrics["eval_reward"]))
    replay(alone, tmp_path / "best", best.step)
    replayed = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert (alone / "best" / "model.safetensors").read_bytes() == replayed


def test_it_is_the_run_of_the_transformers_engine(alone: Path, tiny: Path, tmp_path: Path) -> None:
    """In float32, where no two tokens of these completions are all but equally likely."""
    Trainer(make_config(tmp_path / "run", tiny), task=make_task(), monitors=[]).train()
    ours, theirs = Journal.read(alone), Journal.read(tmp_path / "run")
    assert [substance(record) for record in ours.steps] == [substance(record) for record in theirs.steps]
    for record, other in zip(ours.evaluations, theirs.evaluations, strict=True):
        assert record.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-6)
    assert ours.evaluations[-1].metrics["eval_kl"] > 1e-4


def test_its_probe_is_the_transformers_engine_s(tiny: Path, tmp_path: Path) -> None:
    given: Any = {"task": make_task(), "sigmas": [1e-7, 0.02, 0.3], "members": 3}
    vllm = {"engine": "vllm", "replicas": None, "batch_size": 16, "device": "cpu", "threads": 1}
    found = probe(make_config(tmp_path / "run", tiny, **vllm), **given)
    assert found.levels[1].spread > 0
    assert found == probe(make_config(tmp_path / "run", tiny), **given)


def test_resumed_it_is_the_undisturbed_run(alone: Path, tiny: Path, tmp_path: Path) -> None:
    run, census = tmp_path / "run", Census(fail_at=3)
    with pytest.raises(RuntimeError, match="the monitor's own"):
        trainer(run, tiny, census, save_steps=2).train()
    assert len(Journal.read(run).steps) == 3
    assert Trainer.resume(run, task=make_task(), monitors=[]).train().steps == 4
    assert_same_run(alone, run)


def test_workers_make_the_run_of_one_engine_and_leave_nobody_behind(alone: Path, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    disconnect()
    run, census, before = tmp_path / "run", Census(), descendants(os.getpid())
    training = trainer(run, tiny, census, workers=2)
    training.pool.wait_for_workers(120)
    assert len(training.pool.crew.ready()) == 2
    training.train()
    assert_same_run(alone, run)
    assert len(census.seen - before) >= 2
    until(lambda: not any(map(alive, census.seen - before)))


def test_a_model_in_two_processes_is_trained_and_leaves_nobody_behind(tiny: Path, tmp_path: Path) -> None:
    """Sums over two processes round otherwise, so its completions may be others; its weights are what replay gives."""
    before, census, run = descendants(os.getpid()), Census(), tmp_path / "run"
    trainer(run, tiny, census, gpus_per_worker=2, steps=1).train()
    assert len(census.seen - before) >= 2
    until(lambda: not any(map(alive, census.seen - before)))
    replay(run, tmp_path / "replayed")
    replayed = (tmp_path / "replayed" / "model.safetensors").read_bytes()
    assert (run / "final" / "model.safetensors").read_bytes() == replayed


def test_every_call_is_on_the_stream_on_which_the_engine_was_started(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's streams of a CPU do nothing, but know which is the current one."""
    checkpoint = Checkpoint(tiny)
    config = Config(model=str(tiny), engine="vllm", dtype="float32", device="cpu", batch_size=8)
    stream = torch.cpu.Stream()
    with torch.cpu.stream(stream):
        engine, weights = open_vllm(checkpoint, with_length(config, 40))
    calls: dict[str, bool] = {}

    def watched(name: str) -> Callable[..., Any]:
        inner = getattr(internals, name)

        def call(llm: Any, *args: Any) -> Any:
            calls[args[0] if name == "call" else name] = torch.cpu.current_stream() is stream
            return inner(llm, *args)

        return call

    for name in ("generate", "score", "call", "reset_prefix_cache", "log_probabilities"):
        monkeypatch.setattr(internals, name, watched(name))

    def use() -> None:
        weights.perturb(Member(1), 0.02)
        engine.generate(PROMPTS, Sampling(12))
        weights.restore()
        weights.apply(UPDATE)
        weights.fingerprint()
        engine.score([[1, 2]], [[3]])
        engine.digest()
        weights.load(checkpoint)
        next(next(iter(weights.runs().values()))())

    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(use).result()
        assert torch.cpu.current_stream() is not stream
        assert engine.llm.llm_engine.vllm_config.model_config.max_model_len == 256
    finally:
        engine.close()
    assert set(calls) >= {"perturb", "restore", "apply", "share_sum", "load", "rows", "generate", "score"}
    assert all(calls.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams of a CPU do nothing")
def test_on_a_gpu_another_thread_generates_what_the_one_that_started_it_does(tiny: Path) -> None:
    """It perturbs and generates at once, on the stream that vLLM's runner waits for."""
    config = Config(model=str(tiny), engine="vllm", dtype="float32", device="cuda", batch_size=32)
    engine, weights = open_vllm(Checkpoint(tiny), with_length(config, 40))

    def use() -> list[Any]:
        found = []
        for seed in range(20):
            weights.perturb(Member(seed), 0.05)
            found.append(engine.generate(PROMPTS, Sampling(12)))
            weights.restore()
        return found

    try:
        expected = use()
        with ThreadPoolExecutor(4) as others:
            for _ in range(4):
                assert others.submit(use).result() == expected
        (same,) = engine.llm.collective_rpc(
            lambda worker: getattr(worker.model_runner, "main_stream", engine.stream) == engine.stream
        )
        assert same
    finally:
        engine.close()
