"""The math task: rows of every known shape, which sets are meant, and its splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.tasks.math import EVALUATION_SETS, INSTRUCTION, TRAINING_SETS, MathConfig

GSM8K = [{"question": f"Tom has {n} apples and buys {n}. How many?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}
         for n in range(1, 41)]  # fmt: skip
MATH = [
    {
        "problem": f"What is ${n}/2$?",
        "solution": rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$.",
        "level": f"Level {n % 5 + 1}",
    }
    for n in range(40)
]


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_gsm8k(tmp_path: Path) -> None:
    source = write(tmp_path / "gsm8k.jsonl", GSM8K)
    task = MathConfig(data=source, system_prompt="Be right.").build(0)
    rows = [*task.train, *task.evaluation]
    assert len(rows) == 40
    row = next(row for row in rows if row["answer"] == ["6"])
    assert row["prompt"] == [
        {"role": "system", "content": "Be right."},
        {"role": "user", "content": f"Tom has 3 apples and buys 3. How many?\n\n{INSTRUCTION}"},
    ]
    assert row["source"] == source
    assert task.gold is not None
    assert task.gold(row) == r"\boxed{6}"
    assert (task.accuracies, task.reward_weights, task.group) == (["math_reward"], [1.0], "source")


def test_levels_are_of_the_training_set_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "math.jsonl", MATH)
    held_out = write(tmp_path / "other.jsonl", [{"problem": "1+1?", "answer": "2", "level": 1}])
    task = MathConfig(data=source, eval_data=held_out, levels="3-5", chat=False).build(0)
    assert [row["answer"] for row in task.train] == [[rf"\frac{{{n}}}{{2}}"] for n in range(40) if n % 5 >= 2]
    assert len(task.evaluation) == 1
    assert task.train[0]["prompt"].startswith("What is $2/2$?\n\n")
    numbers = write(
        tmp_path / "numbers.jsonl", [{"problem": "1+1?", "answer": "2", "level": n} for n in (2, 3.0, None)]
    )
    assert len(MathConfig(data=numbers, eval_data=source, levels="3-5").build(0).train) == 1


def test_several_evaluation_sets_are_told_apart(tmp_path: Path) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", [{"problem": f"{name} {n}", "answer": [str(n)]} for n in range(4)])
            for name in ("one", "two")]  # fmt: skip
    task = MathConfig(data=write(tmp_path / "train.jsonl", GSM8K), eval_data=", ".join(sets), eval_size=3).build(0)
    assert [row["source"] for row in task.evaluation] == [sets[0]] * 3 + [sets[1]] * 3
    scores = {"math_reward": [1.0, 0.0, 1.0, 0.0, 0.0, None]}
    assert task.accuracy_of(task.evaluation, scores) == {"": 2 / 5, sets[0]: 2 / 3, sets[1]: 0.0}


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ({}, TRAINING_SETS["gsm8k"], [("openai/gsm8k:main", "test")]),
        ({"data": "math"}, TRAINING_SETS["math"], [("HuggingFaceH4/MATH-500", "test")]),
        ({"eval_data": "math500,aime"}, TRAINING_SETS["gsm8k"], [EVALUATION_SETS["math500"], EVALUATION_SETS["aime"]]),
        ({"data": "x/y", "split": "s", "eval_data": "amc,z/w", "eval_split": "t"}, ("x/y", "s"),
         [("AI-MO/aimo-validation-amc", "train"), ("z/w", "t")]),
        ({"data": "x.jsonl"}, ("x.jsonl", "train"), []),
    ],
)  # fmt: skip
def test_names_of_known_sets(options: dict[str, Any], training: Any, evaluation: Any) -> None:
    assert MathConfig(**options).sources() == (training, evaluation)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "1+1?", "answer": None}], "row 1: answer is None; give the final answer"),
        ([{"question": "1+1?", "answer": "#### "}], "row 1: answer is '#### '"),
        ([{"question": "", "answer": "2"}], "row 1: question is ''; give text"),
        ([{"text": "1+1?", "answer": "2"}], "no column problem or question; there are answer, text"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: Any, complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        MathConfig(data=write(tmp_path / "x.jsonl", rows)).build(0)


def test_overlap_is_refused_or_dropped(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", GSM8K)
    # The same problem, but for case and spaces.
    again = write(tmp_path / "eval.jsonl", [{"question": GSM8K[4]["question"].upper() + " ", "answer": "10"}])
    with pytest.raises(EstuneError, match="1 of 1 evaluation examples are in the training set too"):
        MathConfig(data=train, eval_data=again, instruction="").build(0)
    task = MathConfig(data=train, eval_data=again, instruction="", drop_overlap=True).build(0)
    assert (len(task.train), len(task.evaluation)) == (39, 1)
