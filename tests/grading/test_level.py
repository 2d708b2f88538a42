"""Rewards of all completions of a member, and of all members at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from estune.completion import Completion
from estune.config import Config
from estune.errors import EstuneError
from estune.grading import corpus_level, isolated, population_level
from estune.grading.grading import Grading, grade
from estune.journal.journal import Journal
from estune.run.evaluate import evaluate_model
from estune.run.graded import Graded, evaluation_metrics, step_metrics
from estune.run.trainer import Trainer
from estune.study.compare.run import check_task
from estune.study.probe import probe
from estune.tasks.base import Task
from estune.tasks.preflight import preflight
from tests.runs import assert_same_run, make_config, make_task, substance, variety

ROWS = [{"prompt": str(n), "spam": n < 2} for n in range(5)]
MEMBERS = [["spam", "spam", "spam", "", ""], ["", "spam", "", "", ""], ["", "", "", "", ""]]
"""Right of five: 4, 4 and 3; true and false positives and missed: 2, 1, 0; 1, 0, 1; 0, 0, 2."""


def right(completions: list[str], spam: list[bool], **_: Any) -> list[float]:
    return [float((text == "spam") == is_spam) for text, is_spam in zip(completions, spam, strict=True)]


@corpus_level
def f1(completions: list[str], spam: list[bool], **_: Any) -> float:
    said = [text == "spam" for text in completions]
    hits = sum(a and b for a, b in zip(said, spam, strict=True))
    return 2 * hits / (sum(said) + sum(spam))


@corpus_level
async def f1_later(**columns: Any) -> float:
    return f1(**columns)


@population_level
def rank(completions: list[list[str]], **_: Any) -> list[float]:
    """The share of other members that wrote less."""
    lengths = [sum(map(len, texts)) for texts in completions]
    return [sum(other < own for other in lengths) / (len(lengths) - 1) for own in lengths]


@population_level
async def rank_later(**columns: Any) -> list[float]:
    return rank(**columns)


def written(texts: list[str]) -> list[Completion]:
    return [Completion(text, [1], True) for text in texts]


def graded(functions: list[Any], weights: list[float] | None = None, **options: Any) -> list[Any]:
    with Grading(functions, weights, **options) as grading:
        return grading.results([grading.submit(ROWS, written(texts)) for texts in MEMBERS])


@pytest.mark.parametrize("function", [f1, f1_later, functools.partial(f1)])
def test_a_corpus_level_reward_is_every_completions_and_the_members_mean(function: Any) -> None:
    """F1 by hand: 4/5, 2/3 and 0. It tells members apart whose share of right completions is the same."""
    found = graded([function])
    assert [g.mean for g in found] == pytest.approx([4 / 5, 2 / 3, 0])
    assert found[1].total == [pytest.approx(2 / 3)] * 5
    assert [g.mean for g in graded([right])] == pytest.approx([4 / 5, 4 / 5, 3 / 5])
    both = graded([right, function], [1.0, 0.5])
    assert [g.mean for g in both] == pytest.approx([4 / 5 + 2 / 5, 4 / 5 + 1 / 3, 3 / 5])


@pytest.mark.parametrize("function", [rank, rank_later, functools.partial(rank)])
def test_a_population_level_reward_sees_all_members(function: Any) -> None:
    found = graded([right, function], [1.0, 2.0])
    assert [g.mean for g in found] == pytest.approx([4 / 5 + 2, 4 / 5 + 1, 3 / 5])
    assert [g.total[0] for g in found] == [3.0, 1.0, 0.0]
    with Grading([right, function]) as grading:
        alone = grading.grade(ROWS, written(MEMBERS[0]))
    assert alone.total == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert set(map(tuple, alone.scores.values())) == {tuple(alone.total), (None,) * 5}


def test_members_come_in_order_with_the_columns_of_one() -> None:
    seen: dict[str, Any] = {}

    @population_level
    def looks(log_extra: Any, log_metric: Any, **given: Any) -> list[float | None]:
        seen.update(given)
        log_extra("place", ["a", "b", "c"])
        log_metric("depth", 3)
        log_metric("asked", 7, total=True)
        return [1.0, None, 0.0]

    found = graded([looks])
    assert seen["completions"] == MEMBERS
    assert seen["completion_ids"] == [[[1]] * 5] * 3
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["spam"] == [row["spam"] for row in ROWS]
    assert [g.mean for g in found] == [1.0, None, 0.0]
    assert [g.extras["place"] for g in found] == [[place] * 5 for place in "abc"]
    metrics = step_metrics([Graded(ROWS, written(texts), g) for texts, g in zip(MEMBERS, found, strict=True)])
    assert (metrics["depth"], metrics["rewards/looks/asked"], metrics["failed_members"]) == (3, 7, 1)


def returns(value: Any, mark: Callable[[Any], Any]) -> Any:
    def function(**_: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return mark(function)


@pytest.mark.parametrize(
    ("mark", "value", "complaint"),
    [
        (corpus_level, [0.5] * 5, r"returned \[0.5, .*\(list\) for all completions: it is corpus-level, not a number"),
        (corpus_level, "x", r"returned 'x' \(str\) for all completions"),
        (corpus_level, ValueError("no set"), "raised ValueError: no set"),
        (population_level, [0.5] * 5, "returned 5 values for 3 members: one each"),
        (population_level, 0.5, "returned 0.5 .*, not a list of numbers; it grades all members together"),
        (population_level, [[0.5], 1, 2], r"returned \[0.5\] \(list\) for member 0, not a number"),
        (
            population_level,
            ValueError("no set"),
            r"raised ValueError: no set .*; it grades all members together, so none",
        ),
    ],
)
def test_what_is_returned_or_raised_instead(mark: Any, value: Any, complaint: str) -> None:
    with pytest.raises(EstuneError, match=f"reward function {complaint}"):
        graded([returns(value, mark)])
    if mark is corpus_level:
        found = graded([right, returns(value, mark)], errors="exclude")
        assert [g.mean for g in found] == [None] * 3
        assert found[0].failures == {"function": {"errors": 5}}
    else:
        with pytest.raises(EstuneError, match="none has a reward: mend it"):
            graded([returns(value, mark)], errors="exclude")


def test_a_member_may_have_no_reward_alone() -> None:
    assert [g.mean for g in graded([returns(None, corpus_level)])] == [None] * 3
    function = returns([1.0, ValueError("no text"), 0.0], population_level)
    assert [g.mean for g in graded([right, function], errors="exclude")] == [
        pytest.approx(1.8),
        None,
        pytest.approx(0.6),
    ]


def sets(*functions: Any, **more: Any) -> Task:
    rows = [{**row, "prompt": row["prompt"] + "?"} for row in ROWS]
    accuracy = more.pop("accuracy", functions[0].__name__)
    return Task("sets", ROWS, rows, list(functions), [1.0] * len(functions), accuracy, **more)


def test_an_evaluation_is_one_set() -> None:
    task = sets(f1, rank)
    grades = grade(task.reward_funcs, None, task.evaluation, written(MEMBERS[1]))
    metrics = evaluation_metrics(task, Graded(task.evaluation, written(MEMBERS[1]), grades))
    assert metrics["eval_accuracy"] == metrics["eval_reward"] == pytest.approx(2 / 3)


def test_gold_answers_are_graded_as_a_whole_set() -> None:
    """F1 of a few of them, of which none is spam, would be nothing by nothing."""
    task = sets(f1, gold=lambda row: "spam" if row["spam"] else "")
    with Grading(task.reward_funcs) as grading:
        assert preflight(task, grading, rows=1) == 10


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EstuneError, match="task sets: accuracy: reward rank is population-level, and an evaluation has one"
    ):
        sets(rank)
    with pytest.raises(EstuneError, match="reward f1 is corpus-level, and has one value for all groups of spam"):
        sets(f1, group="spam")
    for mark in (corpus_level, population_level):
        with pytest.raises(EstuneError, match="-level, and a grader is given one completion at a time: leave it out"):
            Grading([isolated(mark(lambda **_: 0))])
    with pytest.raises(EstuneError, match="probe: reward rank is population-level"):
        probe(make_config(tmp_path, model), task=sets(right, rank))
    for function in (f1, rank):
        with pytest.raises(EstuneError, match="compare: reward .* TRL rewards each completion by itself"):
            check_task(sets(right, function))


@corpus_level
def letters(completions: list[str], **_: Any) -> float:
    """Different characters in all completions together."""
    return len(set("".join(completions))) / 100


@population_level
def novelty(completions: list[list[str]], **_: Any) -> list[float]:
    """The share of a member's completions that no other member wrote for the same prompt."""
    return [
        sum(all(other[i] != text for other in completions if other is not own) for i, text in enumerate(own)) / len(own)
        for own in completions
    ]


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_by_both_is_the_same_with_replicas_replayed_and_resumed(
    model: Path, tmp_path: Path, replicas: int
) -> None:
    def task() -> Task:
        return make_task(letters, novelty)

    def config(name: str, **changes: Any) -> Config:
        return make_config(tmp_path / name, model, replicas=replicas, log_completions=4, **changes)

    Trainer(config("whole"), task=task(), monitors=[]).train()
    Trainer(config("part", steps=2), task=task(), monitors=[]).train()
    Trainer.resume(tmp_path / "part", task=task(), steps=4, monitors=[]).train()
    whole = Journal.read(tmp_path / "whole")
    assert [substance(s) for s in Journal.read(tmp_path / "part").steps] == [substance(s) for s in whole.steps]
    if replicas == 2:
        Trainer(make_config(tmp_path / "one", model, log_completions=4), task=task(), monitors=[]).train()
        assert_same_run(tmp_path / "one", tmp_path / "whole")
    # What the journal says is what the functions give for the completions that were kept.
    table = pyarrow.parquet.read_table(tmp_path / "whole" / "completions" / "step-00001.parquet").to_pydict()
    texts = [[t for t, m in zip(table["completion"], table["member"], strict=True) if m == i] for i in range(4)]
    assert len({tuple(each) for each in texts}) > 1
    expected = [letters(each) + new for each, new in zip(texts, novelty(texts), strict=True)]
    assert whole.steps[0].rewards == pytest.approx(expected)
    assert "eval_rewards/novelty/mean" not in whole.evaluations[0].metrics
    assert whole.evaluations[0].metrics["eval_accuracy"] == whole.evaluations[0].metrics["eval_reward"]
    metrics = evaluate_model(str(tmp_path / "whole"), overrides=["eval_samples=2", "eval_temperature=1"], task=task())
    assert "eval_accuracy" in metrics
    assert "eval_pass@1" not in metrics  # no completion is right by itself


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_how_engines_batch_does_not_matter(model: Path, tmp_path: Path, batch: int) -> None:
    rewards = []
    for name, changes in (("any", {}), ("some", {"batch_size": batch})):
        Trainer(
            make_config(tmp_path / name, model, steps=2, **changes), task=make_task(letters, novelty), monitors=[]
        ).train()
        rewards.append([step.rewards for step in Journal.read(tmp_path / name).steps])
    assert rewards[0] == rewards[1]


def test_a_mix_has_a_corpus_of_each_task_and_no_population(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from estune.grading import corpus_level, population_level\n"
        "train = [{'prompt': f'{n} and ', 'n': n} for n in range(40)]\n"
        "@corpus_level\n"
        "def seen(n, **_): return len(n) / 100\n"
        "@population_level\n"
        "def other(completions, **_): return [0.0] * len(completions)\n"
        "rewards = [seen]\n"
    )
    tasks = {"own": {"name": str(file)}, "brief": {"name": "conciseness", "train_size": 20, "eval_size": 3}}
    config = make_config(tmp_path / "run", Path("tiny"), steps=1, task={"name": "mix", "tasks": tasks}, threads=1)
    trainer = Trainer(config, monitors=[])
    held_out = sum(row["task"] == "own" for row in trainer.task.evaluation)
    trainer.train()
    assert Journal.read(tmp_path / "run").evaluations[0].metrics["eval_rewards/own/seen/mean"] == held_out / 100
    both = tmp_path / "both.py"
    both.write_text(file.read_text().replace("[seen]", "[seen, other]"))
    tasks["own"] = {"name": str(both)}
    with pytest.raises(EstuneError, match="task mix: own: reward other is population-level"):
        make_config(tmp_path / "run", Path("tiny"), task={"name": "mix", "tasks": tasks}).task.build(0)


def test_variety_is_no_level() -> None:
    assert grade([variety], None, ROWS[:1], written(["ab"])).total == [0.2]
