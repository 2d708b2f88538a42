"""Tasks of reasoning-gym: its generators, its scores, and that both sets are what they say."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.grading.isolation import isolation_of
from estune.rewards.gym import GymReward, generator_names
from estune.tasks.base import Task
from estune.tasks.gym import GymConfig
from tests.tasks.scores import scores

pytest.importorskip("reasoning_gym")

NO_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Generators that check an answer, but know none."""


def build(name: str, **options: Any) -> Task:
    return GymConfig(**{"name": f"gym:{name}", "train_size": 6, "eval_size": 4, **options}).build(0)


@pytest.mark.parametrize(
    "name", ["chain_sum", "countdown", "sudoku", "arc_1d", "rearc", "graph_color", "basic_arithmetic", "word_ladder"]
)
def test_gold_answers_get_full_marks_after_a_round_trip_through_json(name: str) -> None:
    task = build(name)
    rows = json.loads(json.dumps([*task.train, *task.evaluation]))
    assert task.gold is not None
    gold = [task.gold(row) for row in rows]
    assert (None in gold) == (name in NO_GOLD)
    if name not in NO_GOLD:
        assert scores(task, rows, [str(text) for text in gold]) == [1.0] * 10
        assert sum(scores(task, rows, ["<answer>no idea</answer>"] * 10)) < 2


def test_a_known_answer() -> None:
    row = {"question": "1+1?", "answer": "2", "metadata": "{}"}
    reward = GymReward("chain_sum")
    columns = {key: [value] * 6 for key, value in row.items()}
    texts = ["so <answer>2</answer>", "<answer> 2 </answer>", "<answer>3</answer>", "2", "<answer></answer>"]
    texts += ["<answer>2</answer></answer>, closed by </answer>"]
    assert reward(prompts=[""] * 6, completions=texts, **columns) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    whole = {key: values[:2] for key, values in columns.items()}
    assert GymReward("chain_sum", tags=False)(prompts=["", ""], completions=["2", " "], **whole) == [1.0, 0.0]
    limits = isolation_of(reward)
    assert limits is not None
    assert limits.deadline is not None


@pytest.mark.parametrize("name", ["chain_sum", "codeio", "list_functions", "pool_matrix"])
def test_data_repeat_with_the_seed_and_leave_global_randomness_alone(name: str) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    first, second = build(name), build(name)
    assert first.data_hash() == second.data_hash()
    assert random.random() == expected
    other = GymConfig(name=f"gym:{name}", train_size=6, eval_size=4).build(1)
    assert other.evaluation == first.evaluation
    assert other.train != first.train
    assert build(name, eval_seed=1).evaluation != first.evaluation


def test_no_question_is_in_both_sets_even_where_there_are_few() -> None:
    task = build("coin_flip", options={"min_trials": "3", "max_trials": 4}, train_size=9, eval_size=5)
    questions = [row["question"] for row in (*task.train, *task.evaluation)]
    assert len(set(questions)) == 14
    with pytest.raises(EstuneError, match="5000 problems wanted, but only [0-9]+ new ones"):
        build("count_bits", options={"min_n": 1, "max_n": 30}, train_size=5000, eval_size=3)


def test_options_of_a_generator() -> None:
    task = build("chain_sum", options={"min_terms": "5", "max_terms": "5", "min_digits": 1, "max_digits": 1})
    assert all(row["question"].count("+") + row["question"].count("-") >= 4 for row in task.train)
    with pytest.raises(EstuneError, match=r"gym:chain_sum: its options .* refused .*min_terns"):
        build("chain_sum", options={"min_terns": 5})
    with pytest.raises(EstuneError, match="refused"):
        build("chain_sum", options={"min_terms": 5, "max_terms": 2})


def test_an_unknown_generator_gets_a_suggestion() -> None:
    with pytest.raises(EstuneError, match="did you mean gym:sudoku"):
        build("sudokuu")
    assert len(generator_names()) > 100


def test_a_version_whose_scorers_nobody_has_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.tasks.gym.version", lambda name: "0.2.0")
    with pytest.raises(EstuneError, match=r"scorers of reasoning-gym 0\.2\.0 may run .* task\.trust_scorers"):
        build("chain_sum")
    assert len(build("chain_sum", trust_scorers=True).train) == 6


def test_prompts() -> None:
    row = build("chain_sum", system_prompt="Hello.").train[0]
    assert row["prompt"][0] == {"role": "system", "content": "Hello."}
    assert row["prompt"][1]["content"].startswith(row["question"])
    assert "<answer>" in row["prompt"][1]["content"]
    assert build("chain_sum", tags=False, chat=False).train[0]["prompt"] == row["question"]
