"""No grader runs what a completion says, and each grades right answers as before when it has seen it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Completion
from estune.grading.grading import Grading
from estune.grading.isolation import Isolation, isolate
from estune.rewards.conciseness import correct_reward, length_reward
from estune.rewards.countdown import answer_reward, format_reward
from estune.rewards.gym import EVALUATED, PARSED, GymReward, generator, generator_names
from estune.rewards.instructions import all_followed
from estune.rewards.math import math_reward
from estune.rewards.model import RewardModel
from estune.rewards.readable import is_formula, is_literal
from estune.tasks.gym import GymConfig
from tests.hostile_rewards import Limited
from tests.models import build_tokenizer
from tests.rewards.long_texts import VALUES
from tests.rewards.payloads import BOMBS, LONG, ODD, programs
from tests.rewards.test_model import build


def problem(name: str, index: int = 0) -> tuple[GymReward, dict[str, list[Any]]]:
    """A generator's reward, and the columns of one of its problems."""
    return GymReward(name), columns_of(name, generator(name, "{}", 1, 9)[index])


def columns_of(name: str, entry: dict[str, Any]) -> dict[str, list[Any]]:
    row = GymConfig(name=f"gym:{name}").row(entry)
    return {key: [row[key]] for key in ("question", "answer", "metadata")}


def score(reward: GymReward, text: str, columns: dict[str, list[Any]]) -> float | None:
    return reward(prompts=[""], completions=[f"<answer>{text}</answer>"], **columns)[0]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_generator_of_reasoning_gym_runs_an_answer(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    canary = tmp_path / "canary"
    texts = [*programs(str(canary)), *ODD]
    for name in generator_names():
        if name == "composite":  # options cannot say what it is made of; see below
            continue
        reward, columns = problem(name)
        scores = [score(reward, text, columns) for text in texts]
        assert not canary.exists(), name
        assert all(value is not None and value < 1.0 for value in scores), name
        if columns["answer"] != [None]:
            assert score(reward, columns["answer"][0], columns) == 1.0, name


@pytest.mark.parametrize("part", ["spiral_matrix", "puzzle24"])
def test_a_composite_runs_no_answer_to_its_parts(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.composite import DatasetSpec

    mixed = gym.create_dataset("composite", seed=1, size=1, datasets=[DatasetSpec(part, 1.0, {})])
    monkeypatch.setattr("estune.rewards.gym.generator", lambda *_: mixed)
    canary = tmp_path / "canary"
    columns = columns_of("composite", mixed[0])
    scores = [score(GymReward("composite"), text, columns) for text in (*programs(str(canary)), *ODD)]
    assert not canary.exists()
    assert all(value is not None and value < 1.0 for value in scores)
    assert score(GymReward("composite"), columns["answer"][0], columns) == 1.0


@pytest.mark.parametrize("text", [*programs("/canary"), "oracle_answer", "valid_solutions[0]", "x.y", "f(2)"])
def test_a_program_is_neither_a_literal_nor_a_formula(text: str) -> None:
    assert not is_formula(text)
    assert not is_literal(text) or text.startswith(('{"', '["'))  # of strings, which nothing evaluates again


@pytest.mark.parametrize(
    "text",
    [
        *("1", "-(2 + 3)*4/5**2", "3*X**3/2 + C", "x*sin(2*x)*exp(-x**2) - log(x, 2)", "E**(2*x)/2 + C", "1.5e3*pi"),
        *("(1 +\n2)", "sqrt(x)/(x + 1)", " - 5*y**2*z"),
    ],
)
def test_formulas(text: str) -> None:
    assert is_formula(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("spiral_matrix", "[1, 2, 3]", 0.1),
        ("string_insertion", "['A', 'B']", 0.1),
        ("countdown", "3*(4 + 1)", 1.0),
        ("puzzle24", "(3*8)*(5 - 4)", 1.0),
        ("polynomial_multiplication", "x*(x + 1)", 1.0),
        ("simple_integration", "x**2/2 + 7", 1.0),
        ("intermediate_integration", "sin(x) + cos(pi)", 1.0),
        ("complex_arithmetic", "nan", 0.0),
        ("game_of_life_halting", "False", 0.0),
        ("boxnet", "[[]]", 0.0),
    ],
)
def test_answers_in_another_form_than_the_gold_score_as_the_library_says(name: str, text: str, expected: float) -> None:
    pytest.importorskip("reasoning_gym")
    known = {
        "spiral_matrix": ("1 2 3", {}),
        "string_insertion": ("AB", {}),
        "countdown": ("", {"numbers": [3, 4, 1], "target": 15}),
        "puzzle24": ("", {}),
        "polynomial_multiplication": ("x*(x + 1)", {}),
        "simple_integration": ("", {"variable": "x", "integrand": "x"}),
        "intermediate_integration": ("", {"variable": "x", "integrand": "cos(x)"}),
        "complex_arithmetic": ("1 + 2i", {"result": (1, 2)}),
        "game_of_life_halting": ("True", {}),
        "boxnet": (None, {"initial_state": {}}),
    }
    gold, metadata = known[name]
    columns = {"question": ["?"], "answer": [gold], "metadata": [repr(metadata)]}
    assert score(GymReward(name), text, columns) == expected


def test_bombs_are_held_to_the_deadline_and_the_pool_stays_whole() -> None:
    pytest.importorskip("reasoning_gym")
    reward, columns = problem("countdown")
    limited = isolate(Limited(reward), Isolation(deadline=1.0))
    row = {"prompt": "p", **{key: values[0] for key, values in columns.items()}}
    texts = [BOMBS[1], columns["answer"][0]]
    with Grading([limited], processes=1) as grading:
        completions = [Completion(f"<answer>{text}</answer>", [], True) for text in texts]
        assert grading.grade([row] * len(texts), completions).total == [0.0, 1.0]


def graded(
    functions: Sequence[Callable[..., Any]], row: dict[str, Any], texts: Sequence[str]
) -> dict[str, list[float | None]]:
    """Scores of one pool's completions, all of the same row."""
    with Grading(functions, processes=1) as grading:
        return grading.grade([{"prompt": "p", **row}] * len(texts), [Completion(t, [], True) for t in texts]).scores


def test_math_countdown_and_the_rest_read_and_do_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    texts = [f"<think></think>\n<answer>{text}</answer>" for text in (*programs(str(canary)), *ODD, *LONG)]
    gold = "<think></think>\n<answer>1 + 2</answer>"
    row = {"numbers": [1, 2], "target": 3, "answer": "3"}
    row |= {"instruction_id_list": list(VALUES), "kwargs": list(VALUES.values())}
    scores = graded(
        [answer_reward, format_reward, correct_reward, length_reward, all_followed], row, [*texts, gold, "3"]
    )
    assert not canary.exists()
    assert scores["answer_reward"] == [0.0] * len(texts) + [1.0, 0.0]
    assert scores["format_reward"][-2] == 1.0
    assert scores["correct_reward"][-1] == 1.0


def test_math_verify_runs_no_answer(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    canary = tmp_path / "canary"
    texts = [rf"\boxed{{{text}}}" for text in (*programs(str(canary)), *ODD, LONG[0])]
    texts += [f"the answer is {text}" for text in programs(str(canary))]
    scores = graded([math_reward], {"answer": r"\frac{1}{2}"}, [*texts, r"\boxed{0.5}"])["math_reward"]
    assert not canary.exists()
    assert scores == [0.0] * len(texts) + [1.0]


def test_a_reward_model_takes_programs_for_words(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    model = RewardModel(build(), build_tokenizer())
    (name, scores), *_ = graded([model], {}, [*programs(str(canary)), "fine"]).items()
    assert not canary.exists()
    assert scores[-1] == pytest.approx(graded([model], {}, ["fine"])[name][0], abs=1e-4)


def test_every_check_of_text_is_linear() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rewards.long_texts"], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "read\n", done.stderr


def test_the_scorers_that_evaluate_are_those_that_are_known() -> None:
    """By their source; of what they call in turn, the canary tells."""
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    found = {}
    for name, (kind, _) in DATASETS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.score_answer)))
        calls = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        found[name] = calls & {"eval", "exec", "compile", "parse_expr", "sympify", "literal_eval", "load", "__import__"}
    assert len(found) == 106
    # number_sorting evaluates the gold answer, and only where that is no JSON.
    assert {name for name, calls in found.items() if "eval" in calls} == EVALUATED | {"number_sorting"}
    assert {name for name, calls in found.items() if "parse_expr" in calls} == PARSED
    assert set().union(*found.values()) == {"eval", "parse_expr"}
