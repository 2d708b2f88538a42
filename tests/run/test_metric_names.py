"""Settings that name a metric: what there cannot be is refused before anything is generated."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from estune import Config, ESConfig, ESTrainer, Trainer
from estune.errors import EstuneError
from estune.grading.convention import reward_name
from estune.run.metric_names import of_evaluation, of_member
from estune.tasks.base import Task
from tests.cli.test_commands import refused

ROWS = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "kind": "even" if i % 2 else "odd"} for i in range(16)]
HELD_OUT = ROWS[8:]
TRAIN = ROWS[:8]


def right(completions: Any, answer: Any, **_: Any) -> list[float]:
    return [float(a in text) for text, a in zip(completions, answer, strict=True)]


def told(completions: Any, log_metric: Any, **_: Any) -> list[float]:
    log_metric("words", 3.0)
    return [1.0] * len(completions)


def passing(completions: Any, **kwargs: Any) -> list[float]:
    return told(completions, **kwargs)


class Graded:
    """A reward function that is an object."""

    def __call__(self, completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)


def make_task(*functions: Any) -> Task:
    first = reward_name(functions[0])
    return Task("mine", TRAIN, HELD_OUT, list(functions), [1.0] * len(functions), first, group="kind")


@pytest.mark.parametrize(
    ("functions", "name", "known"),
    [
        ([right], "completions/mean_length", True),
        ([right], "rewards/right/mean", True),
        ([right], "rewards/right/timeouts", True),
        ([right], "reward", True),
        ([Graded()], "rewards/Graded/mean", True),
        ([functools.partial(told)], "rewards/told/calls", True),
        ([right], "completions/mean_lenght", False),
        ([right], "rewards/wrong/mean", False),
        ([right], "rewards/right/calls", False),  # which it does not count
        ([right], "words", False),
        ([right, told], "words", True),
        ([passing], "words", True),
        ([right, told], "rewards/right/calls", False),
        ([right, told], "rewards/told/calls", True),
        ([told], "completions/mean_lenght", False),  # a name that no function can take
        ([told], "step_time", False),
        ([told], "eval_reward", False),
    ],
)
def test_which_names_a_members_metrics_can_have(functions: list[Any], name: str, known: bool) -> None:
    names = of_member(make_task(*functions))
    if known:
        names.refuse_unknown(name, "constraint")
    else:
        with pytest.raises(EstuneError, match=f"constraint: no metric can be called '{name}'"):
            names.refuse_unknown(name, "constraint")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("eval_accuracy", True),
        ("eval_accuracy/odd", True),
        ("eval_accuracy/od", False),
        ("eval_kl", True),
        ("eval_pass@4", True),
        ("eval_pass@3", False),
        ("eval_words", False),
        ("eval_completions/mean_lenght", False),
        ("watch/other/accuracy", True),
        ("watch/other/words", True),
        ("watch/other/completions/mean_lenght", False),
        ("watch/another/accuracy", False),
        ("loss", False),
    ],
)
def test_which_names_an_evaluations_metrics_can_have(name: str, known: bool) -> None:
    names = of_evaluation(make_task(right), Config(eval_samples=4), {"other": make_task(told)})
    if known:
        names.refuse_unknown(name, "best_by")
    else:
        with pytest.raises(EstuneError, match="no metric can be called"):
            names.refuse_unknown(name, "best_by")


def test_all_metrics_of_a_real_run_are_known(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"steps": 1, "population": 2, "prompts_per_step": 2, "max_new_tokens": 4}
    config = Config(output_dir=tmp_path / "run", eval_samples=2, eval_temperature=0.5, replicas=1, threads=1, **tiny)
    task = make_task(right, told)
    trainer = Trainer(config, task=task, monitors=[])
    trainer.train()
    names = of_evaluation(task, config, {})
    evaluations = trainer.journal.evaluations
    assert len(evaluations) == 2
    found = {name for evaluation in evaluations for name in evaluation.metrics} - {"step"}
    assert found - names.known == {"eval_words"}
    own = {name for name in trainer.journal.steps[0].metrics if name.startswith(("completions/", "rewards/"))}
    assert own
    assert own <= of_member(task).known


def test_a_constraint_on_no_metric_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--constraint", "completions/mean_lenght<=20", "--output_dir", tmp_path / "run"]
    for more in ([], ["--dry-run"]):
        line = refused(capsys, "train", *options, *more)
        assert "constraint: no metric can be called 'completions/mean_lenght'" in line
        assert "did you mean completions/mean_length" in line
        assert not (tmp_path / "run").exists()


def test_a_sweep_of_no_metric_is_refused_before_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sweep.sigma", "0.1,0.2", "--output-dir", tmp_path / "sweep"]
    line = refused(capsys, "sweep", *options, "--metric", "eval_completions/mean_lenght")
    assert "did you mean eval_completions/mean_length" in line
    assert not (tmp_path / "sweep").exists()


def test_a_best_model_by_no_metric_is_refused(tmp_path: Path) -> None:
    args = ESConfig(output_dir=str(tmp_path / "run"), max_steps=1, metric_for_best_model="eval_rewards/rigth/mean")
    trainer = ESTrainer("tiny", reward_funcs=[right], args=args, train_dataset=TRAIN, eval_dataset=HELD_OUT)
    with pytest.raises(EstuneError, match="metric_for_best_model.*did you mean eval_rewards/right/mean"):
        trainer.train()
