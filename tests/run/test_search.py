"""Runs by every combination of a strategy's parts: replayed, cut off and resumed, and spread over workers."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.directory import RunDirectory
from estune.run.monitors.base import Metrics, Monitor, Request, Sample
from estune.run.trainer import Trainer
from tests.models import FUSABLE, save_model
from tests.runs import cut, make_config, make_task, train, variety

ROOT = Path(__file__).parents[2]


def fitting(changes: dict[str, Any]) -> dict[str, Any]:
    """Guided members are of no rank; and neither guard nor one-fifth rule looks at where sharpness-aware steps go."""
    if "sam_rho" in changes:
        changes = {name: value for name, value in changes.items() if name not in ("guard", "adapt_sigma")}
    of_low_rank = changes.get("noise", "").startswith("rank")
    return changes | {"noise": "iid"} if "guided_share" in changes and of_low_rank else changes


COURSES = ["constant", "linear", "cosine"]
BASE = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.sampled_from([0.02, "2sigma"]),
        "lr_scheduler_type": st.sampled_from(COURSES),
        "min_lr_rate": st.just(0.2),
        "warmup_steps": st.integers(0, 3),
        "sigma_scheduler_type": st.sampled_from(COURSES),
        "sigma_warmup_steps": st.integers(0, 3),
        "shaping": st.sampled_from(["zscore", "centered_ranks", "winsorized", "elite", "raw"]),
        "shaping_share": st.just(0.5),
        "per_prompt": st.sampled_from(["none", "center", "standardize"]),
        "reward_quantile": st.sampled_from([0.0, 0.3]),
        "constraint": st.sampled_from(["completions/mean_length<=4", "rewards/variety/mean>=0.9", "kl<=0.001"]),
        "sigma_scale": st.sampled_from([{"*.mlp.*": 0.5}, {"*norm*": 0.25, "*": "rms"}]),
        "weight_decay": st.just(0.1),
        "anchor_decay": st.just(0.3),
        "anchor_l1": st.just(0.01),
        "mirrored": st.booleans(),
        "train_parameters": st.just("*.layers.*"),
        "noise": st.sampled_from(["iid", "correlated", "rank1", "rank4"]),
    },
)
WITH_BASE = st.fixed_dictionaries(
    {}, optional={"adapt_sigma": st.booleans(), "evaluate_base": st.booleans(), "guard": st.sampled_from([0.0, 0.5])}
)
WITH_GROUPS = st.sampled_from([{}, {"prompt_groups": 2, "prompts_per_step": 3}])
WITH_PAST = st.fixed_dictionaries(
    {}, optional={"momentum": st.sampled_from([0.3, 0.8]), "momentum_window": st.integers(1, 3)}
)
WITH_ADAM = st.fixed_dictionaries({"adam": st.just(True)}, optional={"adam_beta1": st.sampled_from([0.0, 0.5])})
WITH_GUIDED = st.fixed_dictionaries(
    {"guided_share": st.sampled_from([0.3, 0.9])}, optional={"guided_window": st.just(2)}
)
WITH_SHARPNESS = st.fixed_dictionaries({"sam_rho": st.sampled_from([0.1, 1.0])})
SAMPLED = st.sampled_from([{}, {"samples_per_prompt": 2, "best_of": 2, "temperature": 1.0}])
COMBINATIONS = st.tuples(
    BASE,
    st.one_of(WITH_PAST, WITH_ADAM, WITH_GUIDED, WITH_SHARPNESS),
    WITH_BASE,
    WITH_GROUPS,
    SAMPLED,
    st.fixed_dictionaries({"save_steps": st.sampled_from([0, 1])}),
    st.sampled_from([{}, {"back_to_best": 0.0, "eval_steps": 1}]),
).map(lambda parts: fitting(functools.reduce(operator.or_, parts)))


@given(COMBINATIONS, st.integers(1, 3), st.sampled_from([1, 2]))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_combination_replays_resumes_and_spreads_to_the_same_bits(
    model: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], steps: int, replicas: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    fingerprints = train(folder / "whole", model, **changes)
    assert replay(folder / "whole", folder / "replayed") == fingerprints[-1]
    cut(folder / "whole", folder / "cut", steps)
    Trainer.resume(folder / "cut", task=make_task(), monitors=[]).train()
    whole, resumed = Journal.read(folder / "whole").steps, Journal.read(folder / "cut").steps
    assert [(r.fingerprint, r.sigma, r.rewards, r.state) for r in resumed] == [
        (r.fingerprint, r.sigma, r.rewards, r.state) for r in whole
    ]
    if replicas > 1:  # which take seconds to start
        assert train(folder / "spread", model, **changes, replicas=replicas) == fingerprints


ALL = {
    "momentum": 0.6,
    "anchor_decay": 0.4,
    "anchor_l1": 0.005,
    "prompt_groups": 2,
    "per_prompt": "standardize",
    "constraint": "completions/mean_length<=4",
    "sigma_scheduler_type": "cosine",
    "noise": "rank2",
    "sigma_scale": {"*norm*": 0.25, "*": "rms"},
}
GUIDED = {"momentum": 0.0, "guided_share": 0.5, "guided_window": 2, "noise": "iid"}
SHARPNESS = {"momentum": 0.0, "sam_rho": 0.5}
MOMENTS = {"momentum": 0.0, "adam": True, "save_steps": 2, "noise": "iid"}


@pytest.mark.parametrize(
    ("weights", "noise"), [("inplace", "rank4"), ("exact_inplace", "rank1"), ("split_master", "rank8")]
)
def test_low_rank_noise_of_weights_without_a_base_replays_and_resumes(
    model: Path, tmp_path: Path, weights: str, noise: str
) -> None:
    """In place, what each member leaves behind is part of the run, and so none may be decoded without perturbing."""
    dtype = "bfloat16" if weights == "split_master" else "auto"
    fingerprints = train(tmp_path / "run", model, noise=noise, weights=weights, dtype=dtype)
    assert replay(tmp_path / "run", tmp_path / "replayed") == fingerprints[-1]
    cut(tmp_path / "run", tmp_path / "cut", 2)
    Trainer.resume(tmp_path / "cut", task=make_task(), monitors=[]).train()
    assert [record.fingerprint for record in Journal.read(tmp_path / "cut").steps] == fingerprints


@pytest.mark.parametrize(
    ("weights", "twin", "noise"), [("exact_inplace", "copy", "rank2"), ("split_master", "master", "rank1")]
)
def test_low_rank_noise_of_members_one_by_one_is_taken_back_to_the_bit(
    tmp_path: Path, weights: str, twin: str, noise: str
) -> None:
    """Norms of queries and keys make members be decoded one by one."""
    base = save_model(tmp_path / "qwen3", "qwen3", **FUSABLE)
    common: Any = {"noise": noise, "dtype": "bfloat16", "rounding": "nearest"}
    found = [train(tmp_path / policy, base, weights=policy, **common) for policy in (weights, twin)]
    assert found[0] == found[1]
    rewards = [[step.rewards for step in Journal.read(tmp_path / policy).steps] for policy in (weights, twin)]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("changes", [{}, MOMENTS, GUIDED, SHARPNESS], ids=["all", "adam", "guided", "sharpness"])
def test_the_parts_give_the_same_bits_on_any_number_of_replicas(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """And of workers: `tests/pool/test_ray_pool.py`."""
    one = train(tmp_path / "one", model, **ALL | changes)
    assert one == train(tmp_path / "more", model, **ALL | changes | {"replicas": 2})


def test_nobody_looks_at_weights_amid_a_sharpness_aware_step(model: Path, tmp_path: Path) -> None:
    class Impatient(Monitor):
        """Asks for everything after each step."""

        step = 0

        def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
            self.step = int(metrics["step"])

        def requests(self) -> set[Request]:
            return {"evaluate", "save"} | ({"stop"} if self.step == 3 else set())

    config = make_config(tmp_path / "run", model, steps=8, eval_steps=3, save_steps=3, sam_rho=0.5)
    trainer = Trainer(config, task=make_task(), monitors=[Impatient()])
    trainer.train()
    assert [e.step for e in trainer.journal.evaluations] == [0, 2, 4]
    assert trainer.run.checkpoints() == [4, 2]
    train(tmp_path / "patient", model, steps=8, eval_steps=3, save_steps=3, sam_rho=0.5)
    patient = Journal.read(tmp_path / "patient")
    assert [e.step for e in patient.evaluations] == [0, 4, 6, 8]
    assert RunDirectory(tmp_path / "patient").checkpoints() == [6, 4]
    with pytest.raises(EstuneError, match="amid a sharpness-aware step: give start_step 2"):
        train(tmp_path / "branch", model, start_from=tmp_path / "patient", start_step=3)


def test_moments_go_on_in_a_branch_and_after_a_loss(model: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", model, adam=True)
    train(tmp_path / "branch", model, adam=True, start_from=tmp_path / "whole", start_step=2, steps=2)
    assert replay(tmp_path / "branch", tmp_path / "replayed") == Journal.read(tmp_path / "branch").fingerprint()
    steps = [Journal.read(tmp_path / name).steps for name in ("whole", "branch")]
    assert [r.update.moments for r in steps[1]] == [r.update.moments for r in steps[0][2:]]
    with pytest.raises(EstuneError, match="was run with adam, and its moments go on: set adam=true"):
        train(tmp_path / "plain", model, start_from=tmp_path / "whole")


def test_members_of_a_group_share_prompts_and_the_base_shares_all(model: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def spying(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
        seen.append(prompts)
        return variety(completions)

    config = make_config(tmp_path / "run", model, steps=1, prompt_groups=2, prompts_per_step=2, eval_on_start=False)
    Trainer(config, task=make_task(spying), monitors=[]).train()
    of_members = [prompts for prompts in seen if len(prompts) == 2]
    assert of_members[0] == of_members[1] != of_members[2] == of_members[3]
    assert not set(of_members[0]) & set(of_members[2])

    seen.clear()
    guarded = config.model_copy(update={"output_dir": tmp_path / "guarded", "guard": 100.0})
    trainer = Trainer(guarded, task=make_task(spying), monitors=[])
    trainer.train()
    of_members = [prompts for prompts in seen if len(prompts) == 2]
    first, second = of_members[0], of_members[3]
    assert of_members == [first] * 3 + [second] * 3 + [first, second]  # the base as the third, and again at the end
    (record,) = trainer.journal.steps
    assert [m.sign for m in record.update.members] == [1, 1, 0, 1, 1, 0]
    assert record.metrics["reward_base"] == pytest.approx(np.mean([record.rewards[2], record.rewards[5]]))

    train(tmp_path / "with base", model, steps=1, evaluate_base=True)
    record = Journal.read(tmp_path / "with base").steps[0]
    assert [m.sign for m in record.update.members] == [1, 1, 1, 1, 0]
    assert record.update.coefficients[-1] == 0.0
    assert record.metrics["reward_base"] == record.rewards[-1]
    assert record.of_members == record.rewards[:-1]
    assert record.metrics["reward"] == pytest.approx(np.mean([r for r in record.rewards[:-1] if r is not None]))


def test_a_constraint_on_an_unknown_metric_names_those_there_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="no metric can be called 'length'; there are completions/clipped_ratio, "):
        train(tmp_path / "run", model, constraint="length<=4")


def test_a_second_tasks_reward_is_kept_by_a_mix_whose_steps_may_lack_it(model: Path, tmp_path: Path) -> None:
    """The model knows no fact, so that each step with one makes facts dearer, and no member pays more than another."""
    facts = {"name": "conciseness", "correct_weight": 0, "length_weight": 0, "train_size": 20, "eval_size": 2}
    sums = {"name": str(ROOT / "examples" / "sums.py"), "train_size": 20, "eval_size": 2}
    config = make_config(
        tmp_path / "run",
        model,
        task={"name": "mix", "tasks": {"sums": sums, "facts": facts}, "weights": {"sums": 3}},
        constraint="rewards/facts/correct_reward/mean>=0.5",
        prompts_per_step=2,
        steps=6,
        learning_rate=0.0,
    )
    trainer = Trainer(config, monitors=[])
    trainer.train()
    labels = [{trainer.task.train[i]["task"] for i in record.prompts} for record in trainer.journal.steps]
    assert {"facts" in each for each in labels} == {True, False}
    penalty = 0.0
    for record, each in zip(trainer.journal.steps, labels, strict=True):
        asked = "facts" in each
        assert (record.fitness or record.rewards) == record.rewards
        penalty += 0.5 * asked
        assert record.state["penalty"] == penalty


def test_members_that_are_far_from_the_base_model_pay_for_it(model: Path, tmp_path: Path) -> None:
    """How far they are, is in `test_instruments.py`."""
    train(tmp_path / "run", model, constraint="kl<=0.001", constraint_rate=0.25, evaluate_base=True)
    penalty = 0.0
    for record in Journal.read(tmp_path / "run").steps:
        if record.step:
            paid = np.array(record.rewards, float) - np.array(record.fitness, float)  # the base's, too
            assert paid.std() == pytest.approx(penalty * np.std(record.rewards))
            assert (paid[:-1].mean() > 0) == (record.metrics["kl"] > 0.001)
            over = np.clip(paid.mean() / paid.std(), -1, 1)
            assert record.state["penalty"] == pytest.approx(max(0.0, penalty + 0.25 * over))
        penalty = record.state["penalty"]
        assert penalty > 0


def test_groups_pay_as_much_as_each_other_whatever_their_prompts(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"population": 8, "prompt_groups": 2, "learning_rate": 0.0, "steps": 3}
    train(tmp_path / "run", model, constraint="completions/mean_length<=2", **changes)
    dear = [record for record in Journal.read(tmp_path / "run").steps if record.fitness]
    assert dear
    for record in dear:
        paid = np.array(record.rewards, float) - np.array(record.fitness, float)
        assert paid.std() > 0
        assert paid[:4].mean() == pytest.approx(paid[4:].mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_groups": 3}, "population 4 makes no 3 prompt_groups of equal size"),
        ({"prompt_groups": 2, "population": 6, "mirrored": True}, "in pairs"),
        ({"best_of": 2}, "best_of 2 of samples_per_prompt 1"),
        ({"samples_per_prompt": 2}, "set temperature"),
        ({"anchor_decay": 0.1, "weights": "copy"}, "set weights=master"),
        ({"anchor_decay": 30.0, "learning_rate": "2sigma"}, "anchor_decay 30 times the learning rate, 0.04, is more"),
        (
            {"weight_decay": 11.0, "learning_rate": 0.1},
            "weight_decay 11 times the learning rate, 0.1, is more than the whole way",
        ),
        ({"constraint": "length=4"}, "write METRIC<=NUMBER"),
        ({"adam": True, "weights": "copy"}, "weights must be master"),
        ({"adam": True, "momentum": 0.5}, "momentum 0"),
        ({"guided_share": 0.5, "weights": "exact_inplace"}, "weights must be master or copy"),
        ({"guided_share": 0.5, "noise": "rank2"}, "noise iid or correlated"),
        ({"constraint": "kl<=0.1", "weights": "exact_inplace"}, "weights master or copy"),
        ({"constraint": "kl<=0.1", "engine": "vllm"}, "engine must be transformers"),
        ({"guard": 0.5, "weights": "inplace"}, "guard and back_to_best take steps back exactly"),
        ({"back_to_best": 0.05, "eval_steps": 0}, "eval_steps 0 makes none on the way"),
        ({"sam_rho": 0.5, "steps": 5}, "steps 5 would end amid a step of sam_rho"),
        ({"sam_rho": 0.5, "guard": 0.5}, "leave out guard"),
        ({"sam_rho": 0.5, "momentum": 0.5}, "leave out momentum"),
        ({"sam_rho": 0.5, "weights": "int8"}, "leave out momentum, weight_decay and sam_rho"),
        ({"sigma_scale": {"*": 0}}, "a number above 0, from"),
        ({"sigma_scale": {"*": "root"}}, "sigma_scale"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, tmp_path, **changes)
