"""Journals of runs that nobody trained: any steps over a small model, as training would have written them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from estune.es.evolution import EvolutionStrategy
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, Header, StepRecord
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from estune.weights.weights import Weights


def write_history(
    folder: Path, base: Path, steps: int = 3, *, seed: int = 0, dtype: str = "float32", final: bool = True, **rule: Any
) -> Journal:
    """Write a run's journal, and `final`; `rule` is what `Weights` and `EvolutionStrategy` take."""
    checkpoint = Checkpoint(base)
    kept = {key: rule.pop(key) for key in ("policy", "rounding") if key in rule}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), trust_remote_code=False)
    weights = Weights(trained_parameters(model, checkpoint.tensors), **kept)
    weights.load(checkpoint)
    header = Header(
        model=str(base),
        base_hash=checkpoint.content_hash(),
        policy=weights.rule.policy,
        rounding=weights.rule.rounding,
        noise="iid",
        dtype=weights.rule.dtype,
        live_dtype=dtype,
        tensors=weights.tensors,
        fingerprint=weights.fingerprint(),
        task="variety",
        data_hash="",
        config={"seed": seed, "steps": steps, "task": {"name": "countdown"}},
        packages={},
        created="2026-01-01T00:00:00+00:00",
    )
    folder.mkdir(parents=True)
    journal = Journal.create(folder, header)
    strategy = EvolutionStrategy(**{"seed": seed, "population": 4, "sigma": 0.01, **rule})
    journal.append_evaluation(EvaluationRecord(0, {"step": 0, "eval_accuracy": 0.25, "eval_reward": 0.5}))
    for step in range(steps):
        rewards: list[float | None] = [0.1 * (i + step) for i, _ in enumerate(strategy.ask())]
        rate = strategy.learning_rate
        for member in strategy.ask():
            weights.perturb(member, strategy.sigma)
        update = strategy.tell(rewards)
        weights.apply(update)
        metrics = {"step": step + 1, "reward": 0.1 * step + 1 / 3, "time/update": 0.1234567890123 * (step + 1)}
        record = StepRecord(update, rate, rewards, [step, 7], weights.fingerprint(), metrics)
        journal.append_step(record)
    if final:
        checkpoint.write(folder / "final", weights.runs(), header.save_dtype)
    journal.append_end("finished")
    journal.close()
    return journal


def forge(folder: Path, number: int, **changes: Any) -> None:
    """Change a step's record, with all checksums made anew."""
    journal = Journal.read(folder)
    records = [replace(r, **changes) if r.step == number else r for r in journal.steps]
    journal.path.unlink()
    new = Journal.create(folder, journal.header)
    for record in records:
        new.append_step(record)
    new.append_end("finished")
    new.close()
