"""Whole runs: against an independent implementation of the paper, replayed, evaluated, and fed bad input."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.records import StepRecord
from estune.journal.replay import replay
from estune.noise import reference
from estune.run.monitors.base import Monitor
from estune.run.order import RowOrder
from estune.run.trainer import Trainer
from tests.models import FUSABLE, save_model
from tests.runs import assert_same_run, make_config, make_task, metrics, run, substance, variety, variety_by_generate


def test_a_run_is_the_papers_algorithm(model: Path, tmp_path: Path) -> None:
    """Every step again in plain torch: `generate` per prompt, noise from the reference, the update as one sum."""
    config = make_config(tmp_path / "run", model, steps=2, learning_rate=0.05, prompts_per_step=3)
    run(config)
    net = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    task = make_task()

    def noise(seed: int, name: str) -> torch.Tensor:
        flat = reference.normal_by_id(seed, reference.tensor_id(name), 0, theta[name].numel())
        return torch.from_numpy(flat).view(theta[name].shape)

    def reward_with(weights: dict[str, torch.Tensor], rows: list[int]) -> float:
        net.load_state_dict(weights, strict=False)
        return variety_by_generate(net, tokenizer, [task.train[i]["prompt"] for i in rows])

    for record in Journal.read(tmp_path / "run").steps:
        members = record.update.members
        rewards = [
            reward_with({n: t + np.float32(0.02) * noise(m.seed, n) for n, t in theta.items()}, record.prompts)
            for m in members
        ]
        assert rewards == pytest.approx(record.rewards)
        assert np.std(rewards) > 0
        z = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        for n, t in theta.items():
            t += sum(float(0.05 / 4 * z_i) * noise(m.seed, n) for z_i, m in zip(z, members, strict=True))
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for n, t in theta.items():
        torch.testing.assert_close(final[n], t, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weights": "copy", "dtype": "bfloat16", "rounding": "stochastic", "train_parameters": "*.mlp.*"}],
    ids=["master", "copy"],
)
def test_the_number_of_replicas_changes_nothing(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    for replicas in (1, 2, 3):
        run(make_config(tmp_path / str(replicas), model, replicas=replicas, **settings))
        assert_same_run(tmp_path / "1", tmp_path / str(replicas))
        assert (
            Journal.read(tmp_path / "1").header.fingerprint == Journal.read(tmp_path / str(replicas)).header.fingerprint
        )


@pytest.mark.parametrize(
    ("weights", "twin", "rounding"), [("exact_inplace", "copy", "stochastic"), ("split_master", "master", "nearest")]
)
def test_weights_that_are_taken_back_take_the_steps_of_those_with_a_base(
    model: Path, tmp_path: Path, weights: str, twin: str, rounding: str
) -> None:
    options: Any = {"dtype": "bfloat16", "rounding": rounding, "save_steps": 2}
    run(make_config(tmp_path / "twin", model, weights=twin, **options))
    for replicas in (1, 2):
        folder = tmp_path / str(replicas)
        run(make_config(folder, model, weights=weights, replicas=replicas, steps=2, **options))
        Trainer.resume(folder, steps=4, task=make_task(), monitors=[]).train()
        a, b = Journal.read(tmp_path / "twin"), Journal.read(folder)
        assert a.header.fingerprint == b.header.fingerprint
        assert [substance(record) for record in a.steps] == [substance(record) for record in b.steps]
        for name in ("final", "best", "checkpoint-2"):
            one, other = (run / name / "model.safetensors" for run in (tmp_path / "twin", folder))
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": "copy", "dtype": "bfloat16", "rounding": "stochastic"},
        {"weights": "inplace", "dtype": "bfloat16"},
        {"weights": "exact_inplace", "dtype": "bfloat16", "rounding": "stochastic", "weight_decay": 0.1},
        {"weights": "split_master", "dtype": "bfloat16", "weight_decay": 0.1, "anchor_decay": 0.2},
        {"weights": "master", "dtype": "bfloat16", "noise": "correlated", "weight_decay": 0.1, "mirrored": True},
        {"train_parameters": "*.mlp.*"},
    ],
    ids=["master", "copy", "inplace", "exact_inplace", "split_master", "correlated", "frozen"],
)
def test_replay_gives_the_trained_weights(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run(make_config(tmp_path / "run", model, save_steps=2, **settings))
    journal = Journal.read(tmp_path / "run")
    assert replay(tmp_path / "run", tmp_path / "all") == journal.fingerprint()
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == final
    replay(tmp_path / "run", tmp_path / "two", 2, dtype=journal.header.dtype)
    saved = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == saved
    base = {k: v.to(torch.float32) for k, v in load_file(model / "model.safetensors").items()}
    trained = {k: v.to(torch.float32) for k, v in load_file(tmp_path / "all" / "model.safetensors").items()}
    changed = {
        k
        for k, v in trained.items()
        if not torch.equal(v, base[k].to(torch.bfloat16).float() if "dtype" in settings else base[k])
    }
    assert changed == set(journal.header.tensors)
    AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    assert AutoTokenizer.from_pretrained(tmp_path / "all").chat_template


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_best_and_final_are_stored_as_the_base_or_as_asked(tmp_path: Path, asked: str) -> None:
    base = save_model(tmp_path / "base", **FUSABLE)
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    config = make_config(tmp_path / "run", base, steps=1, dtype="float32", save_dtype=asked, device="cpu")
    run(config)
    replay(tmp_path / "run", tmp_path / "exact", dtype="float32")
    replay(tmp_path / "run", tmp_path / "again")
    exact, again, final = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "exact", tmp_path / "again", tmp_path / "run/final")
    )
    dtype = torch.float32 if asked == "float32" else torch.bfloat16
    assert any(not torch.equal(weights, weights.bfloat16().float()) for weights in exact.values())
    for name, weights in exact.items():
        assert final[name].dtype == dtype
        assert torch.equal(final[name], weights.to(dtype))
        assert torch.equal(final[name], again[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").dtype == dtype
    with pytest.raises(EstuneError, match="is done after 1 step; give --steps above 1"):  # nothing is lacking
        Trainer.resume(tmp_path / "run", task=make_task(), monitors=[], steps=1)


def test_step_zero_is_the_base(model: Path, tmp_path: Path) -> None:
    run(make_config(tmp_path / "run", model, steps=1))
    replay(tmp_path / "run", tmp_path / "zero", 0)
    assert (tmp_path / "zero" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_replay_refuses_what_does_not_fit(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    run(make_config(folder, model, steps=2))
    with pytest.raises(EstuneError, match="has 2 steps, not 3"):
        replay(folder, out, 3)
    other = save_model(tmp_path / "other", seed=5, **FUSABLE)
    with pytest.raises(EstuneError, match="give the original with --model"):
        replay(folder, out, model=str(other))
    with pytest.raises(EstuneError, match="exists already"):
        replay(folder, folder)
    # A step that never was, sealed by one who knows how: the fingerprint tells.
    journal = Journal.resume(folder)
    journal.append_step(
        StepRecord(replace(journal.steps[0].update, step=2), 0.01, [1.0] * 4, [0], "0123456789abcdef", {})
    )
    journal.close()
    with pytest.raises(EstuneError, match="gives fingerprint"):
        replay(folder, out)
    assert not out.exists()
    replay(folder, out, 2)


def test_evaluations_best_and_files(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = Trainer(make_config(folder, model, steps=5, report_to=["tensorboard"]), task=make_task()).train()
    journal = Journal.read(folder)
    assert [e.step for e in journal.evaluations] == [0, 2, 4, 5]
    assert len(journal.steps) == 5
    best = max(journal.evaluations, key=lambda e: e.metrics["eval_accuracy"])
    assert summary.best == best.metrics
    replay(folder, tmp_path / "best", best.step)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == (
        folder / "best" / "model.safetensors"
    ).read_bytes()
    lines = metrics(folder)
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    for line, record in zip(steps, journal.steps, strict=True):
        assert line["reward"] == pytest.approx(np.mean(record.rewards))
        assert line["reward_std"] == pytest.approx(np.std(record.rewards))
    names = {"rewards/variety/mean", "completions/mean_length", "completions/clipped_ratio", "num_tokens", "step_time"}
    assert names <= set(steps[0])
    for line in steps:
        assert line["tokens_per_second"] * line["step_time"] == pytest.approx(24 * line["completions/mean_length"])
    on = json.loads((folder / "machine.json").read_text())
    assert on["processor"]
    assert on["cores"] >= 1
    assert on["memory"] > 1 << 28
    assert on["device"] == platform.machine()
    table = pq.read_table(folder / "completions" / "step-00001.parquet").to_pylist()
    assert len(table) == 6
    assert [row["reward"] for row in table] == pytest.approx(variety([row["completion"] for row in table]))
    assert np.mean([row["reward"] for row in table]) == pytest.approx(journal.steps[0].rewards[0])
    assert any((folder / "tensorboard").iterdir())


class Recorder(Monitor):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.seen.append(f"step {metrics['step']}")

    def on_evaluate(self, metrics: Any, sample: Any) -> None:
        self.seen.append(f"evaluation {metrics['step']}")


def test_monitors_are_told_in_order(model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    Trainer(make_config(tmp_path / "run", model, steps=3), task=make_task(), monitors=[recorder]).train()
    assert recorder.seen == ["evaluation 0", "step 1", "step 2", "evaluation 2", "step 3", "evaluation 3"]


def test_early_stopping(model: Path, tmp_path: Path) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    config = make_config(tmp_path / "run", model, steps=50, eval_steps=1, early_stopping_patience=3)
    summary = run(config, constant)
    assert (summary.ended, summary.steps, summary.best["step"]) == ("stopped early", 3, 0)
    assert all(set(r.update.coefficients) == {0.0} for r in Journal.read(tmp_path / "run").steps)


def test_inplace_reports_its_drift(model: Path, tmp_path: Path) -> None:
    run(make_config(tmp_path / "run", model, weights="inplace", dtype="bfloat16"))
    for record in Journal.read(tmp_path / "run").steps:
        assert record.metrics["weights/drift_changed"] > 0.01
        assert record.metrics["weights/drift_rms"] > 0


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    task = make_task()
    for side, rows in (("training", task.train), ("evaluation", task.evaluation)):
        kept, rows[2]["prompt"] = rows[2]["prompt"], "long " * 60  # type: ignore[index]
        with pytest.raises(EstuneError, match=f"{side} row 2: 300 tokens .* beyond the 256 positions"):
            Trainer(make_config(tmp_path / "run", model, steps=9), task=task, monitors=[])
        rows[2]["prompt"] = kept  # type: ignore[index]
    assert not (tmp_path / "run").exists()


def test_rows_are_drawn_without_replacement() -> None:
    order = RowOrder(10, 4, seed=3)
    drawn = [i for step in range(5) for i in order.rows(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert RowOrder(10, 4, seed=3).rows(2) == drawn[8:12]
    assert RowOrder(10, 4, seed=4).rows(0) != drawn[:4]
    assert RowOrder(10, 50, seed=3).rows(7) == list(range(10))
