"""What is told beside the reward: distance from the base model; and who sees to a run: monitors and graders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from estune.completion import Sampling
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.grading.modules import load_file as load_module
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.local import open_local_pool
from estune.pool.replica import Replica
from estune.render import RENDERER
from estune.run.graded import grade_completions
from estune.run.monitors.base import Monitor, Request
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from estune.weights.storage import as_array
from tests.grading.test_pool import alive
from tests.journal.test_faults import children
from tests.models import FUSABLE, save_model
from tests.runs import assert_same_run, make_config, make_task, substance, variety

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


class Steering(Monitor):
    """Writes down what it is told, and asks for what it is given by step."""

    def __init__(self, wanted: dict[int, set[Request]]) -> None:
        self.wanted, self.done = wanted, 0
        self.seen: list[str] = []
        self.saved: Callable[[int], None] = lambda step: None

    def on_step_begin(self, step: int) -> None:
        self.seen.append(f"begin {step}")

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.done = metrics["step"]
        self.seen.append(f"end {self.done}")

    def on_evaluate(self, metrics: Any, sample: Any) -> None:
        self.seen.append(f"evaluation {metrics['step']}")

    def on_save(self, step: int) -> None:
        self.saved(step)
        self.seen.append(f"save {step}")

    def requests(self) -> set[Request]:
        return self.wanted.get(self.done, set())


def test_monitors_ask_for_evaluations_checkpoints_and_the_end(model: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"steps": 6, "eval_steps": 0}
    steering, other = Steering({1: {"evaluate"}, 3: {"stop"}}), Steering({1: {"save"}, 2: {"save"}})
    there: list[int] = []
    other.saved = lambda step: there.extend([step] * (run / f"checkpoint-{step}" / "model.safetensors").is_file())
    summary = Trainer(make_config(run, model, **settings), task=make_task(), monitors=[steering, other]).train()
    assert (summary.ended, summary.steps) == ("stopped early", 3)
    assert steering.seen == other.seen == [
        *("evaluation 0", "begin 1", "end 1", "evaluation 1", "save 1"),
        *("begin 2", "end 2", "save 2", "begin 3", "end 3"),
    ]  # fmt: skip
    assert there == [1, 2]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    replay(run, tmp_path / "two", 2)
    saved = (run / "checkpoint-2" / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == saved
    replay(run, tmp_path / "three")
    final = (run / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == final
    assert Trainer.resume(run, task=make_task(), monitors=[]).train().steps == 6
    Trainer(make_config(tmp_path / "whole", model, **settings), task=make_task(), monitors=[]).train()
    whole, cut = Journal.read(tmp_path / "whole"), Journal.read(run)
    assert [substance(record) for record in whole.steps] == [substance(record) for record in cut.steps]
    assert [e.step for e in cut.evaluations] == [0, 1, 6]


def test_checkpoints_on_schedule_are_told_too(model: Path, tmp_path: Path) -> None:
    steering = Steering({2: {"save"}})
    config = make_config(tmp_path / "run", model, steps=3, eval_steps=0, save_steps=2)
    Trainer(config, task=make_task(), monitors=[steering]).train()
    assert [line for line in steering.seen if line.startswith("save")] == ["save 2"]


SOURCE = """
import time
from estune.grading import isolated


def odd(text):
    return sum(map(ord, text)) % 13 == 0


def graded(text):
    return len(set(text)) / 10


@isolated(deadline=20.0)
def apart(completions, **_):
    return [graded(text) for text in completions]


@isolated(deadline=1.5, failure_score=-0.5)
def hangs(completions, **_):
    while odd(completions[0]):
        time.sleep(0.1)
    return [graded(completions[0])]


@isolated(deadline=20.0)
def raises(completions, **_):
    if odd(completions[0]):
        raise KeyError("odd")
    return [graded(completions[0])]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Rewards that run in graders, which find them by the path of their file."""
    file = tmp_path_factory.mktemp("rewards") / "isolated_rewards.py"
    file.write_text(SOURCE)
    return load_module(file)


class Watching(Monitor):
    """Notes the graders that a run has, and fails at a step if it is to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.trainer: Trainer | None = None
        self.graders: set[int] = set()

    def on_member_end(self, done: int, population: int) -> None:
        assert self.trainer is not None
        for grading in (self.trainer.grading, *(w.grading for w in self.trainer.evaluations.watched.values())):
            if grading.pool is not None:
                self.graders |= set(grading.pool.pids())

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.on_member_end(0, 0)  # a grader that hung has been replaced
        assert any(map(alive, self.graders))
        if metrics["step"] == self.fail_at:
            raise RuntimeError("the monitor's own")


def processes() -> set[int]:
    """Those that this one has started, but for the one that renders chat templates, which lasts as long as this."""
    renderer = RENDERER.process
    return set(children(os.getpid())) - ({renderer.pid} if renderer else set())


def train_watched(output: Path, model: Path, reward: Any, *, fail_at: int | None = None, **settings: Any) -> set[int]:
    """Train by a reward; the graders there were, of which none may be left."""
    watching, before = Watching(fail_at), processes()
    config = make_config(output, model, **{"graders": 2, "log_completions": 4, **settings})
    watching.trainer = Trainer(config, task=make_task(reward), monitors=[watching])
    try:
        watching.trainer.train()
    finally:
        assert watching.graders
        assert not any(map(alive, watching.graders))
        assert processes() <= before
    return watching.graders


def test_rewards_in_graders_give_the_same_run(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    train_watched(tmp_path / "apart", model, rewards.apart)
    Trainer(make_config(tmp_path / "here", model), task=make_task(variety), monitors=[]).train()
    apart, here = Journal.read(tmp_path / "apart"), Journal.read(tmp_path / "here")
    assert [substance(record) for record in apart.steps] == [substance(record) for record in here.steps]
    for record, other in zip(apart.evaluations, here.evaluations, strict=True):
        assert record.metrics["eval_accuracy"] == other.metrics["eval_accuracy"]
    for name in ("final", "best"):
        a, b = (tmp_path / run / name / "model.safetensors" for run in ("apart", "here"))
        assert a.read_bytes() == b.read_bytes()


def completions_of(run: Path, step: int) -> list[list[str]]:
    """The completions of each member of a step."""
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "completions" / f"step-{step:05d}.parquet").to_pylist()
    return [[row["completion"] for row in rows if row["member"] == member] for member in range(4)]


def test_a_grader_that_hangs_does_not_stop_the_run(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    train_watched(tmp_path / "run", model, rewards.hangs, steps=2, eval_steps=0)
    hung = 0
    for record in Journal.read(tmp_path / "run").steps:
        texts = completions_of(tmp_path / "run", record.step + 1)
        scores = [[-0.5 if rewards.odd(text) else rewards.graded(text) for text in of_member] for of_member in texts]
        assert record.rewards == pytest.approx([np.mean(of_member) for of_member in scores])
        expected = sum(rewards.odd(text) for of_member in texts for text in of_member)
        assert record.metrics["rewards/hangs/timeouts"] == expected
        hung += expected
    assert 0 < hung < 10


def test_completions_that_cannot_be_graded_are_left_out_and_counted(
    model: Path, tmp_path: Path, rewards: ModuleType
) -> None:
    train_watched(tmp_path / "run", model, rewards.raises, steps=2, eval_steps=0, reward_errors="exclude")
    failed = 0
    for record in Journal.read(tmp_path / "run").steps:
        texts = completions_of(tmp_path / "run", record.step + 1)
        scores = [[rewards.graded(text) for text in of_member if not rewards.odd(text)] for of_member in texts]
        assert record.rewards == pytest.approx([np.mean(of_member) for of_member in scores])
        expected = sum(rewards.odd(text) for of_member in texts for text in of_member)
        assert record.metrics.get("rewards/raises/errors", 0) == expected
        failed += expected
    assert failed > 0
    # Of the first evaluation's four completions so many can fail: it is a step that ends the run.
    settings = {"steps": 50, "eval_steps": 0, "reward_errors": "exclude", "max_reward_errors": 4}
    with pytest.raises(EstuneError, match="more than max_reward_errors, 4"):
        train_watched(tmp_path / "strict", model, rewards.raises, **settings)


def test_no_grader_is_left_after_an_exception(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    watched = tmp_path / "watched.py"
    watched.write_text(SOURCE + '\ntrain = [{"prompt": "a"}]\nevaluation = [{"prompt": "b"}]\nrewards = [apart]\n')
    with pytest.raises(RuntimeError, match="the monitor's own"):
        train_watched(tmp_path / "run", model, rewards.apart, fail_at=1, watch=str(watched))
    before = processes()
    task = make_task(rewards.apart, gold=lambda row: "a")
    with pytest.raises(EstuneError, match="the gold answer of training row 0 should get 1, but apart gives 0.1"):
        Trainer(make_config(tmp_path / "never", model, graders=2), task=task, monitors=[])
    assert processes() <= before


def test_a_finished_run_with_graders_can_go_on(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    task = make_task(rewards.apart)
    Trainer(make_config(tmp_path / "run", model, graders=1), task=task, monitors=[]).train()
    Trainer.resume(tmp_path / "run", steps=6, graders=2, task=task, monitors=[]).train()
    Trainer(make_config(tmp_path / "whole", model, steps=6, graders=2), task=task, monitors=[]).train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
