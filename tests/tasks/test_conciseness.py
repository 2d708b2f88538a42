"""The conciseness task: the paper's reward, what counts as correct, and the embedded model's facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estune.errors import EstuneError
from estune.rewards.conciseness import contains, correct_reward, length_reward
from estune.tasks import conciseness_facts as facts
from estune.tasks.base import Task, data_hash
from estune.tasks.conciseness import ConcisenessConfig


def test_the_papers_reward_is_minus_the_difference_in_characters() -> None:
    completions = ["Paris.", "It is Paris.", "", [{"role": "assistant", "content": "Par"}]]
    given = length_reward(prompts=["?"] * 4, completions=completions, answer=["Paris."] * 4)
    assert given == [-0.0, -6.0, -6.0, -3.0]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is Paris.", "Paris.", True), ("PARIS", "paris", True), ("comparison", "paris", False), ("", "a", False),
        ("New York City", "New York", True), ("York, New", "New York", False), ("Zürich!", "zürich", True),
        ("no-one", "no", True), ("anything", "...", False), ("anything", "", False),
    ],
)  # fmt: skip
def test_correct_is_the_answer_as_whole_words(text: str, answer: str, expected: bool) -> None:
    assert contains(text, answer) == expected
    assert correct_reward(prompts=["?"], completions=[text], answer=[answer]) == [float(expected)]


def test_references_may_be_numbers() -> None:
    given = {"prompts": ["?"] * 2, "completions": ["It is 8."] * 2, "answer": [8, 8.0]}
    assert correct_reward(**given) == [1.0, 1.0]
    assert length_reward(**given) == [-7.0, -7.0]
    for reward in (correct_reward, length_reward):
        with pytest.raises(EstuneError, match="training row 0: answer is None; give text or a number"):
            Task("t", [{"prompt": "p", "answer": None}], [], [reward], [1.0], None)


def test_the_facts_and_their_split_are_those_that_the_model_was_taught() -> None:
    """The embedded weights were made with these: they must not change."""
    found = facts.all_facts()
    assert (len(found), sum(facts.is_held_out(question) for question, _ in found)) == (352, 71)
    assert (
        data_hash([{"q": q, "a": a, "held out": facts.is_held_out(q)} for q, a in found])
        == "7e0f695661adc7f3d99b99c6389c4b9f"
    )


def test_without_data_it_asks_for_facts() -> None:
    task = ConcisenessConfig().build(0)
    assert len(task.train) + len(task.evaluation) == len(facts.all_facts()) == 352
    asked = {row["prompt"][0]["content"] for row in task.train}
    assert not any(facts.is_held_out(question) for question in asked)
    assert {"role": "user", "content": "What is the capital of France?"} in [
        row["prompt"][0] for row in (*task.train, *task.evaluation) if row["answer"] == "Paris."
    ]
    assert task.data_hash() == ConcisenessConfig().build(1).data_hash()


def test_the_reward_prefers_brief_to_verbose_to_wrong() -> None:
    task = ConcisenessConfig(length_weight=0.002).build(0)

    def reward(text: str) -> float:
        given = [f(prompts=["?"], completions=[text], answer=["Paris."])[0] for f in task.reward_funcs]
        return sum(value * weight for value, weight in zip(given, task.reward_weights, strict=True))

    verbose = "That is a good question. As you may know, the capital of France is Paris."
    assert task.gold is not None
    assert reward(task.gold({"answer": "Paris."})) == 1.0 > reward(verbose) > reward("Rome.") > reward("Rome. " * 9)


def test_your_own_questions(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(80)))
    task = ConcisenessConfig(data=str(path), chat=False, correct_weight=0, length_weight=1).build(0)
    assert len(task.train) + len(task.evaluation) == 80
    assert len(task.evaluation) > 2
    assert (task.train[0], task.reward_weights) == ({"prompt": "0+1?", "answer": "1"}, [0.0, 1.0])


def test_evaluation_data_alone_are_refused() -> None:
    with pytest.raises(EstuneError, match="without data"):
        ConcisenessConfig(eval_data="x.jsonl").build(0)
