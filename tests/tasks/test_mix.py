"""Several tasks in one run: shares, whose reward grades whose rows, stages, and accuracy by task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from estune.grading.convention import is_async, reward_name
from estune.grading.isolation import isolated, isolation_of
from estune.tasks.base import Stage, Task
from estune.tasks.mix import LABEL, MixConfig, Only, OnlyAsync, blend, only_for

TWO: dict[str, Any] = {"easy": {"name": "countdown", "train_size": 30, "eval_size": 4}, "conciseness": {"eval_size": 6}}


def build(**options: Any) -> Task:
    return MixConfig(**{"tasks": TWO, **options}).build(0)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ({"a": 2, "b": 2}, {"a": 1, "b": 1}, [0, 1, 2, 3]),
        ({"a": 2, "b": 1}, {"a": 1, "b": 1}, [0, 1, 2, 2]),
        ({"a": 2, "b": 1}, {"a": 1, "b": 2}, [0, 1, 2, 2, 2, 2]),
        ({"a": 2, "b": 3}, {"b": 5}, [2, 3, 4]),
        ({"a": 1, "b": 3}, {"a": 0, "b": 1}, [1, 2, 3]),
    ],
)
def test_shares(sizes: dict[str, int], weights: dict[str, float], expected: list[int]) -> None:
    assert blend(sizes, weights) == expected


def test_rows_are_of_both_tasks_by_weight() -> None:
    task = build(weights={"easy": 3})
    found = Counter(row[LABEL] for row in task.train)
    assert found["easy"] == 3 * found["conciseness"]
    assert Counter(row[LABEL] for row in task.evaluation) == {"easy": 4, "conciseness": 6}
    assert set(task.train[0]) == {"prompt", "numbers", "target", "answer", "task"}
    assert len({row["prompt"] for row in task.train if row[LABEL] == "easy"}) == 30


def test_rewards_apply_to_their_own_rows() -> None:
    task = build()
    assert [reward_name(f) for f in task.reward_funcs] == [
        "easy/answer_reward", "easy/format_reward", "conciseness/correct_reward", "conciseness/length_reward",
    ]  # fmt: skip
    easy = {"prompt": "?", "numbers": [1, 2], "target": 3, "answer": None, "task": "easy"}
    brief = {"prompt": "?", "numbers": None, "target": None, "answer": "Paris.", "task": "conciseness"}
    rows = [brief, easy, easy]
    columns = {key: [row[key] for row in rows] for key in easy if key != "prompt"}
    texts = ["Paris.", "<answer>1+2</answer>", "Paris."]
    given = [f(prompts=["?"] * 3, completions=texts, **columns) for f in task.reward_funcs]
    assert given[0] == [None, 1.0, 0.0]
    assert given[1] == [None, 0.5, 0.0]
    assert given[2] == [1.0, None, None]
    assert given[3] == [0.0, None, None]
    scores = {reward_name(f): values for f, values in zip(task.reward_funcs, given, strict=True)}
    assert task.accuracy_of(rows, scores) == {"": 2 / 3, "conciseness": 1.0, "easy": 0.5}
    assert task.gold is not None
    assert [task.gold(row) for row in rows] == ["Paris.", None, None]


def test_each_task_sees_completions_as_its_own_prompts_are() -> None:
    seen: list[Any] = []

    def look(completions: Any, **_: Any) -> list[float]:
        seen.append(completions)
        return [0.0] * len(completions)

    as_message, as_text = [{"role": "assistant", "content": "a"}], "a"
    for chat in (True, False):
        for given in (as_message, as_text):
            Only("x", look, (), chat)(task=["x"], prompts=["?"], completions=[given], completion_ids=[[1]])
    assert seen == [[as_message], [as_message], [as_text], [as_text]]


def test_what_a_function_logs_is_spread_over_all_rows() -> None:
    logged: dict[str, Any] = {}

    def noisy(completions: Any, log_extra: Any, n: Any, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [float(value) for value in n]

    only = Only("x", noisy, ("n",), False)
    given = only(task=["y", "x", "y"], prompts=[""] * 3, completions=["a", "bb", "c"], n=[1, 2, 3],
                 log_extra=logged.__setitem__)  # fmt: skip
    assert given == [None, 2.0, None]
    assert logged == {"length": [None, 2, None]}


@isolated(deadline=3.0)
def slow(completions: Any, **_: Any) -> list[float]:
    return [1.0] * len(completions)


async def later(completions: Any, **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_isolated_and_async_functions_stay_so() -> None:
    import asyncio
    import pickle

    def task(function: Any) -> Task:
        return Task("t", [{"prompt": "a"}], [{"prompt": "b"}], [function], [1.0], function.__name__)

    only = only_for("x", task(slow), slow)
    limits = isolation_of(pickle.loads(pickle.dumps(only)))
    assert limits is not None
    assert limits.deadline == 3.0
    waiting = only_for("x", task(later), later)
    assert isinstance(waiting, OnlyAsync)
    assert is_async(waiting)
    given = waiting(task=["x", "y"], prompts=["", ""], completions=["", ""])
    assert asyncio.run(given) == [1.0, None]  # type: ignore[arg-type]


def test_which_rows_a_function_applies_to() -> None:
    only = Only("x", slow, (), False)
    assert only.applies({LABEL: ["y", "x"]})
    assert not only.applies({LABEL: ["y"]})


def test_a_task_that_is_not_evaluated_and_columns_of_one_set_alone() -> None:
    def bare(train: dict[str, Any], evaluation: list[dict[str, Any]]) -> Task:
        return Task("t", [train], evaluation, [slow], [1.0], "slow" if evaluation else None)

    assert only_for("x", bare({"prompt": "a", "n": 1}, []), slow).columns == ("n",)
    assert only_for("x", bare({"prompt": "a", "n": 1}, [{"prompt": "b", "m": 1}]), slow).columns == ("n", "m")
    assert only_for("x", bare({"prompt": [{"role": "user", "content": "a"}]}, [{"prompt": "b"}]), slow).chat


def test_a_mix_without_any_evaluation_set(tmp_path: Path) -> None:
    path = tmp_path / "bare.py"
    path.write_text(
        "from estune import Task\n\ndef zero(completions, **_): return [0.0] * len(completions)\n"
        "def task(seed): return Task('t', [{'prompt': 'a'}], [], [zero], [1.0], None)\n"
    )
    task = MixConfig(tasks={"bare": {"name": str(path)}}).build(0)
    assert (len(task.train), task.evaluation, task.accuracies) == (1, [], [])


def test_stages() -> None:
    stages = [
        {"weights": {"conciseness": 1}, "until_step": 5},
        {"weights": {"easy": 1, "conciseness": 1}, "until_accuracy": {"easy": 0.5}},
        {"weights": {"easy": 1}},
    ]
    task = build(stages=stages)
    labels = [Counter(task.train[i][LABEL] for i in stage.rows) for stage in task.stages]
    assert set(labels[0]) == {"conciseness"}
    assert labels[1]["easy"] == labels[1]["conciseness"]
    assert labels[2] == {"easy": 30}
    assert [stage.until_step for stage in task.stages] == [5, None, None]


def test_when_an_accuracy_ends_a_stage() -> None:
    stage = Stage([0], until_accuracy={"easy": 0.5, "": 0.2})
    assert stage.reached({"eval_accuracy/easy": 0.5, "eval_accuracy": 0.2})
    assert not stage.reached({"eval_accuracy/easy": 0.5, "eval_accuracy": 0.1})
    assert not stage.reached({"eval_accuracy": 0.9})
    assert not Stage([0]).reached({"eval_accuracy": 1.0})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tasks": {}}, "a mix needs tasks"),
        ({"weights": {"hard": 1}}, "no task of the mix is called 'hard'; there are easy, conciseness"),
        ({"weights": {"easy": -1}}, "none may be negative"),
        ({"weights": {"easy": 0, "conciseness": 0}}, "one must be more than 0"),
        ({"weights": {"easy": 1}, "stages": [{"weights": {"easy": 1}}]}, "leave out one"),
        ({"stages": [{"weights": {"easy": 1}}] * 2}, "never ends: give until_step or until_accuracy"),
        ({"stages": [{"weights": {"easy": 1}, "until_step": 5}] * 2}, "give each stage a later one"),
        ({"stages": [{"weights": {}}]}, "one must be more than 0"),
        ({"tasks": {"easy": {"name": "mix"}}}, "no task is called 'mix'"),
        ({"tasks": {"easy": {}}}, "no task is called 'easy'"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TypeAdapter(MixConfig).validate_python({"tasks": TWO, **options})
