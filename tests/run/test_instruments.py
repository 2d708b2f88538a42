"""What is told beside the reward: how far weights and completions are from the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from estune.completion import Sampling
from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.pool.local import open_local_pool
from estune.pool.replica import Replica
from estune.run.graded import grade_completions
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from estune.weights.storage import as_array
from tests.models import FUSABLE, save_model
from tests.runs import make_config, make_task, substance

UPDATE = Update(0, (Member(3), Member(2**64 - 4, -1)), (0.03, -0.02), decay=-0.01, rounding_seed=5)
PROMPTS = [[(7 * row + i) % 320 for i in range(3 + row)] for row in range(12)]
SAMPLING = Sampling(8)
KINDS = [("master", "float32"), ("copy", "float32"), ("master", "bfloat16"), ("copy", "bfloat16")]


def open_replica(model: Path, weights: str = "master", dtype: str = "float32", **settings: Any) -> Replica:
    return Replica(make_config(Path("unused"), model, weights=weights, dtype=dtype, threads=1, **settings))


def live_bits(replica: Replica) -> list[bytes]:
    return [as_array(parameter.tensor).tobytes() for parameter in replica.weights.parameters]


def answers(replica: Any) -> list[list[int]]:
    return [completion.token_ids for completion in replica.generate(PROMPTS, SAMPLING)]


def log_probabilities(folder: Path, dtype: str, completions: Sequence[Sequence[int]]) -> list[float]:
    """Of all tokens of the completions, by a model of its own, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    found: list[float] = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
        found += [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]
    return found


def norms(now: Path, base: Path, *, rounded: bool) -> dict[str, float]:
    """Norm of the difference of two checkpoints, and over that of the latter."""
    a, b = load_file(now / "model.safetensors"), load_file(base / "model.safetensors")
    b = {name: t.to(torch.bfloat16) if rounded else t for name, t in b.items()}
    difference = np.sqrt(sum(np.square(a[name].double().numpy() - b[name].double().numpy()).sum() for name in b))
    whole = np.sqrt(sum(np.square(t.double().numpy()).sum() for t in b.values()))
    return {"weights/change": difference, "weights/relative_change": difference / whole}


@pytest.mark.parametrize(("weights", "dtype"), [*KINDS, ("inplace", "float32"), ("exact_inplace", "bfloat16")])
def test_distance_from_the_base_is_what_two_models_say(model: Path, tmp_path: Path, weights: str, dtype: str) -> None:
    replica = open_replica(model, weights, dtype)
    keeps_base = "inplace" not in weights
    assert replica.compare(PROMPTS, answers(replica)) == {
        "weights/change": 0.0,
        "weights/relative_change": 0.0,
        **({"kl": 0.0} if keeps_base else {}),
    }
    replica.apply(UPDATE)
    completions = answers(replica)
    before = live_bits(replica), replica.weights.fingerprint()
    replica.evaluate(Member(99), 0.05, PROMPTS, SAMPLING)  # which leaves the live weights perturbed
    found = replica.compare(PROMPTS, completions)
    replica.save(tmp_path / "base type", replica.weights.rule.dtype)
    replica.save(tmp_path / "live type", replica.engine.dtype)
    expected = norms(tmp_path / "base type", model, rounded=weights != "master" and dtype == "bfloat16")
    if weights == "inplace":
        assert found == pytest.approx(expected, rel=1e-3)
        return
    assert (live_bits(replica), replica.weights.fingerprint()) == before
    if not keeps_base:
        assert found == pytest.approx(expected, rel=1e-5)
        return
    assert answers(replica) == completions
    now, base = (log_probabilities(folder, dtype, completions) for folder in (tmp_path / "live type", model))
    logs = np.subtract(base, now)  # Schulman's k3: r - 1 - log r
    kl = float(np.mean(np.exp(logs) - 1 - logs))
    assert kl > 0.1
    assert found.pop("kl") == pytest.approx(kl, rel=1e-4 if dtype == "float32" else 0.05)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", ["iid", "rank1"])
def test_divergence_of_members_is_what_two_models_say(model: Path, tmp_path: Path, noise: Any) -> None:
    members = [Member(5), Member(6, -1)]
    sampling = Sampling(8, temperature=1.0, seed=2)
    replica, plain, twin = (
        open_replica(model, noise=noise, constraint=constraint) for constraint in ("kl<=0.1", None, None)
    )
    for each in (replica, plain, twin):
        each.apply(UPDATE)
    before = answers(replica)
    count = replica.at_once(PROMPTS, sampling)
    assert (count > 1) == (noise == "rank1")
    jobs = [members] if count > 1 else [[member] for member in members]
    found = [each for job in jobs for each in replica.evaluate_each(job, 0.05, PROMPTS, sampling)]
    without = [each for job in jobs for each in plain.evaluate_each(job, 0.05, PROMPTS, sampling)]
    assert [[c.token_ids for c in each.completions] for each in found] == [
        [c.token_ids for c in each.completions] for each in without
    ]
    for number, (member, each) in enumerate(zip(members, found, strict=True)):
        twin.perturb(member, 0.05)
        twin.engine.model.save_pretrained(tmp_path / f"member {number}")
        ids = [completion.token_ids for completion in each.completions]
        now, base = (log_probabilities(at, "float32", ids) for at in (tmp_path / f"member {number}", model))
        logs = np.subtract(base, now)
        graded = grade_completions(make_task(), [{"prompt": ""}] * len(ids), each.completions)
        assert graded.metrics()["kl"] == pytest.approx(float(np.mean(np.exp(logs) - 1 - logs)), rel=1e-3)
    assert answers(replica) == before


@pytest.mark.parametrize(("weights", "dtype"), KINDS)
def test_showing_another_checkpoint_lasts_until_weights_are_restored(
    model: Path, tmp_path: Path, weights: str, dtype: str
) -> None:
    other = save_model(tmp_path / "other", seed=4, **FUSABLE)
    replica, shown = open_replica(model, weights, dtype), open_replica(other, weights, dtype)
    bits, fingerprint = live_bits(replica), replica.weights.fingerprint()
    base = {name: array.copy() for name, array in replica.weights.base.items()}
    replica.weights.show(Checkpoint(other))
    assert live_bits(replica) == live_bits(shown) != bits
    assert replica.engine.generate(PROMPTS, SAMPLING) == shown.engine.generate(PROMPTS, SAMPLING)
    assert replica.weights.fingerprint() == fingerprint
    assert all(np.array_equal(array, base[name]) for name, array in replica.weights.base.items())
    replica.weights.restore()
    assert live_bits(replica) == bits


def test_change_counts_the_trained_parameters_alone(model: Path, tmp_path: Path) -> None:
    replica = open_replica(model, train_parameters="*.mlp.*")
    replica.apply(UPDATE)
    replica.save(tmp_path / "now", "float32")
    trained, base = replica.weights.tensors, load_file(model / "model.safetensors")
    difference, norm = replica.weights.change(Checkpoint(model))
    now = load_file(tmp_path / "now" / "model.safetensors")
    assert difference == pytest.approx(torch.cat([(now[n] - base[n]).view(-1).double() for n in base]).norm().item())
    assert norm == pytest.approx(torch.cat([base[n].view(-1).double() for n in trained]).norm().item())


@pytest.mark.parametrize("weights", ["master", "copy"])
def test_replicas_with_one_base_tell_what_one_does(model: Path, weights: str) -> None:
    one = open_replica(model, weights)
    pool = open_local_pool(make_config(Path("unused"), model, weights=weights, replicas=2, threads=1, device="cpu"))
    try:
        one.apply(UPDATE)
        fingerprint, completions = pool.apply(UPDATE), answers(one)
        assert pool.compare(PROMPTS, completions) == one.compare(PROMPTS, completions)
        assert pool.describe().fingerprint == fingerprint == one.weights.fingerprint()
        for replica in pool.replicas:
            assert [c.token_ids for c in replica.generate(PROMPTS, SAMPLING)] == completions
    finally:
        pool.close()


@pytest.mark.parametrize("weights", ["master", "inplace"])
def test_evaluations_tell_the_distance(model: Path, tmp_path: Path, weights: str) -> None:
    config = make_config(tmp_path / "run", model, weights=weights, learning_rate=0.02)
    trainer = Trainer(config, task=make_task(), monitors=[])
    trainer.train()
    first, *_, last = (e.metrics for e in Journal.read(tmp_path / "run").evaluations)
    told = {"eval_weights/change", "eval_weights/relative_change", *([] if weights == "inplace" else ["eval_kl"])}
    assert {key for key in last if "kl" in key or "weights" in key} == told
    assert {first[key] for key in told} == {0.0}
    assert all(last[key] > 1e-4 for key in told)
    changed = norms(tmp_path / "run" / "final", model, rounded=False)
    assert {key: last[f"eval_{key}"] for key in changed} == pytest.approx(changed, rel=1e-3)
    if weights == "master":
        again = open_replica(model)
        again.load(tmp_path / "run" / "final")
        ids = again.engine.encode([row["prompt"] for row in make_task().evaluation])
        completions = [completion.token_ids for completion in again.generate(ids, SAMPLING)]
        assert again.compare(ids, completions)["kl"] == pytest.approx(last["eval_kl"])


def test_the_comparison_can_be_left_out_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    for name, compare in (("with", True), ("without", False)):
        settings = make_config(tmp_path / name, model, compare_with_base=compare)
        Trainer(settings, task=make_task(), monitors=[]).train()
    ours, plain = Journal.read(tmp_path / "with"), Journal.read(tmp_path / "without")
    assert [substance(record) for record in ours.steps] == [substance(record) for record in plain.steps]
    for record, other in zip(ours.evaluations, plain.evaluations, strict=True):
        assert other.metrics == {k: v for k, v in record.metrics.items() if "weights" not in k and "kl" not in k}
