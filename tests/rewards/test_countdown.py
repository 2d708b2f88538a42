import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estune.errors import EstuneError
from estune.rewards.countdown import answer_reward, format_reward
from estune.rewards.text import last_answer
from estune.tasks import CountdownConfig, Task, data_hash
from estune.tasks.countdown_problems import HELD_OUT_FRACTION, Problem, countdown_prompt, generate_problems, is_held_out
from tests.work import lines_run

PAPER_PROMPT = (
    "You are a helpful assistant. You first think about the reasoning process in your mind and then provide the user "
    "with the answer.Using the numbers [44 19 35], create an equation that equals 98. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
    "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.Let me solve this "
    "step by step.\n<think>"
)


def answer(text: str, numbers: Sequence[int] = (44, 19, 35), target: Any = 98) -> float | None:
    return answer_reward(prompts=[PAPER_PROMPT], completions=[text], numbers=[numbers], target=[target])[0]


def form(text: Any, prompt: Any = PAPER_PROMPT) -> float | None:
    return format_reward(prompts=[prompt], completions=[text])[0]


# The answer's reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so</think>\n<answer>44+19+35</answer>", 1),
        ("<answer> 35 + (44 + 19) </answer>", 1),
        ("<answer>\n44+19+35\n</answer>", 1),
        ("<answer>1</answer> no, <answer>44+19+35</answer>", 1),
        ("<answer>44+19+35</answer> no, <answer>1</answer>", 0),
        ("<answer>44+19+35</answer> and <answer>", 1),
        ("<answer>44+19+35</answer></answer>", 1),
        ("<answer>44+19+35</answer> stands between <answer> and </answer>", 0),
        ("<answer>44+19+35</answer>, closed by </answer>", 1),
        ("<answer>44+19+35", 0),
        ("44+19+35</answer>", 0),
        ("</answer>44+19+35<answer>", 0),
        ("44+19+35", 0),
        ("", 0),
        ("<answer></answer>", 0),
        ("<answer>98</answer>", 0),
        ("<answer>44+19+35+0</answer>", 0),
        ("<answer>44+19+35-44+44</answer>", 0),
        ("<answer>44+35</answer>", 0),
        ("<answer>44+19+35=98</answer>", 0),
        ("<answer>44**19**35</answer>", 0),
        ("<answer>44//19+35</answer>", 0),
        ("<answer>44-19-35</answer>", 0),
    ],
)
def test_answer(text: str, expected: float) -> None:
    assert answer(text) == expected


@pytest.mark.parametrize(
    ("expression", "target", "expected"),
    [
        ("800/3", "266.666", 1), ("800/3", 266.667, 1), ("800/3", "266.66", 0), ("800/3", "266.664", 0),
        ("137/5", "27.4", 1), ("137/5", 27.4, 1), ("137/5", "27", 0), ("137/5", "27.400", 1), ("96/2", "48", 1),
        ("96/2", 48.0, 1), ("96/2", " 48 ", 1), ("2-96", "-94", 1), ("71/3", 71 / 3, 1), ("71/3", str(71 / 3), 1),
        ("71/3", "23.66666", 1), ("72/3", 71 / 3, 0), ("1/99999", 1 / 99999, 1), ("1/99998", 1 / 99999, 0),
        ("2-97/3", 2 - 97 / 3, 1), ("96/2", "4.8e1", 1), ("97/2", "4.8e1", 0),
    ],
)  # fmt: skip
def test_targets_are_rationals(expression: str, target: Any, expected: float) -> None:
    numbers = [int(number) for number in re.findall(r"\d+", expression)]
    assert answer(f"<answer>{expression}</answer>", numbers, target) == expected


@given(st.integers(1, 99), st.integers(2, 99), st.integers(1, 99))
def test_the_float_of_a_quotient_is_reached_by_it_and_by_no_other(one: int, other: int, more: int) -> None:
    assert answer(f"<answer>{one}/{other}</answer>", [one, other], one / other) == 1.0
    if Fraction(more, other) != Fraction(one, other):
        assert answer(f"<answer>{more}/{other}</answer>", [more, other], one / other) == 0.0


@pytest.mark.parametrize("target", ["x", "", None, "1e999", "nan", "inf", "1/3", "9" * 1000])
def test_a_target_that_is_no_number_is_an_error_not_a_zero(target: Any) -> None:
    with pytest.raises(EstuneError, match="target"):
        answer("<answer>1</answer>", [1], target)


@pytest.mark.parametrize("numbers", [["1", "2"], "[1, 2]", "1 2", [1, None], [1.5, 2], [-1, 2], [True, 2], [], None])
def test_numbers_that_are_none_are_an_error_not_a_zero(numbers: Any) -> None:
    with pytest.raises(EstuneError, match="give a list of whole numbers"):
        answer("<answer>1+2</answer>", numbers, 3)
    with pytest.raises(EstuneError, match=r"^task t: training row 1: countdown: the numbers are .*; give a list of"):
        Task("t", [{"prompt": p, "numbers": n, "target": 3} for p, n in (("a", [1, 2]), ("b", numbers))], [],
             [answer_reward], [1.0], None)  # fmt: skip


@pytest.mark.parametrize("numbers", [(1, 2), [1.0, 2.0], np.array([1, 2]), [np.int64(1), 2]])
def test_numbers_of_other_kinds(numbers: Any) -> None:
    assert answer("<answer>1+2</answer>", numbers, 3) == 1.0


def test_messages_are_graded_by_the_last_one() -> None:
    completion = [{"role": "assistant", "content": "</think>\n<answer>44+19+35</answer>"}]
    prompt = [{"role": "user", "content": PAPER_PROMPT}]
    assert answer_reward(prompts=[prompt], completions=[completion], numbers=[[44, 19, 35]], target=[98]) == [1.0]
    assert form(completion, prompt) == 1.0
    assert form([], prompt) == 0.0


@given(
    st.lists(st.sampled_from([*"0123456789+-*/() \n=x", "<answer>", "</answer>", "<think>", "</think>"])).map("".join)
)
def test_any_text_gets_a_reward(text: str) -> None:
    assert answer(text) in (0.0, 1.0)
    assert form(text) in (0.0, 0.1, 0.5, 0.6, 1.0)


@pytest.mark.parametrize(
    "text", ["<answer>" * 10**5, "</answer>" * 10**5, "<answer>" + "(" * 10**6 + "</answer>", "<think>" * 10**5,
             "<answer>" + "9" * 10**6 + "</answer>", "<answer>44**19**35</answer>", "</think>\n<answer>" * 10**5]
)  # fmt: skip
def test_hostile_completions_cost_little(text: str) -> None:
    assert answer(text) == 0.0
    assert lines_run(lambda: answer(text)) < 2_000
    assert lines_run(lambda: form(text)) < 2_000


# The format's reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" so</think>\n<answer>1</answer>", 1.0),
        ("</think>\n<answer></answer>", 1.0),
        ("a</think>\n<answer>1</answer>\n", 1.0),
        ("a</think>\n<answer>1</answer> done", 0.6),
        ("a</think> <answer>1</answer>", 0.6),
        ("a</think>", 0.1),
        ("<answer>1</answer>", 0.5),
        ("<answer>1", 0.0),
        ("", 0.0),
    ],
)
def test_format(text: str, expected: float) -> None:
    assert form(text) == pytest.approx(expected)


def test_the_example_in_the_prompt_earns_nothing() -> None:
    assert form("no idea", PAPER_PROMPT) == 0.0
    assert answer("no idea", [1, 2, 3], 1) == 0.0


def test_a_think_tag_counts_once() -> None:
    assert form("a</think>\n<answer>1</answer>", "no tag at the end") == 0.5
    assert form("<think>a</think>\n<answer>1</answer>", "no tag at the end") == 1.0


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "<answer>", "</answer>", "1", " "]), max_size=9).map("".join)
)
def test_format_is_the_regular_expression(text: str) -> None:
    whole = re.match(r"^<think>.*?</think>\n<answer>.*?</answer>$", text, re.DOTALL)
    think = re.search(r"<think>.*?</think>", text, re.DOTALL)
    pair = re.search(r"<answer>.*?</answer>", text, re.DOTALL)
    assert form(text, "") == (1.0 if whole else 0.1 * bool(think) + 0.5 * bool(pair))


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "1", "2"]), max_size=9).map("".join))
def test_last_answer_is_innermost_of_the_last_pair(text: str) -> None:
    found = re.findall(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", text)
    assert last_answer(text) == (found[-1] if found else None)


# Generated problems


def reachable(values: tuple[Fraction, ...], whole: bool) -> set[Fraction]:
    """Everything that all the values can make, by brute force."""
    if len(values) == 1:
        return {values[0]}
    results = set()
    for i, j in combinations(range(len(values)), 2):
        rest = tuple(value for k, value in enumerate(values) if k not in (i, j))
        a, b = values[i], values[j]
        made = {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set())
        for value in made:
            if not whole or value.denominator == 1:
                results |= reachable((*rest, value), whole)
    return results


@pytest.mark.parametrize("rational", [False, True])
@pytest.mark.parametrize("side", ["train", "evaluation"])
def test_problems_can_be_solved(side: Any, rational: bool) -> None:
    problems = generate_problems(25, side, 7, count=(2, 4), numbers=(1, 30), target=(5, 60), rational=rational)
    assert {len(problem.numbers) for problem in problems} == {2, 3, 4}
    for problem in problems:
        assert all(1 <= number <= 30 for number in problem.numbers)
        assert 5 <= problem.target <= 60
        assert problem.target in reachable(tuple(map(Fraction, problem.numbers)), whole=not rational)


def test_rational_problems_need_fractions_now_and_then() -> None:
    problems = generate_problems(16, "train", 2, count=(4, 4), numbers=(3, 13), target=(30, 99), rational=True)
    assert any(p.target not in reachable(tuple(map(Fraction, p.numbers)), whole=True) for p in problems)


def test_problems_repeat_with_the_seed_and_only_with_it() -> None:
    ranges: dict[str, Any] = {"count": (3, 4), "numbers": (1, 99), "target": (10, 99)}
    assert generate_problems(50, "train", 1, **ranges) == generate_problems(50, "train", 1, **ranges)
    assert generate_problems(50, "train", 1, **ranges) != generate_problems(50, "train", 2, **ranges)
    assert generate_problems(20, "train", 1, **ranges) == generate_problems(50, "train", 1, **ranges)[:20]


def test_problems_of_a_seed_never_change() -> None:
    problems = generate_problems(2, "train", 0, count=(3, 3), numbers=(1, 12), target=(1, 60))
    assert problems == [Problem((12, 7, 5), 14), Problem((1, 5, 8), 13)]
    assert [target for target in range(1, 30) if is_held_out(Problem((1, 2, 3), target))] == [5, 8, 14, 17, 21, 24]


def test_sides_are_disjoint_whatever_the_seeds() -> None:
    ranges: dict[str, Any] = {"count": (3, 3), "numbers": (1, 12), "target": (1, 60)}
    trained_on = {p.key for seed in range(5) for p in generate_problems(2000, "train", seed, **ranges)}
    held_out = [p.key for seed in range(5) for p in generate_problems(200, "evaluation", seed, **ranges)]
    assert not trained_on & set(held_out)
    assert len(set(held_out[:200])) == 200
    share = len(set(held_out)) / len(trained_on | set(held_out))
    assert share == pytest.approx(HELD_OUT_FRACTION, rel=0.25)


@given(st.permutations([3, 7, 7, 12]), st.integers(1, 99))
def test_the_order_of_the_numbers_does_not_change_the_side(numbers: list[int], target: int) -> None:
    assert is_held_out(Problem(tuple(numbers), target)) == is_held_out(Problem((3, 7, 7, 12), target))


def test_ranges_that_hold_too_few_problems() -> None:
    with pytest.raises(EstuneError, match=r"1000 evaluation problems wanted, but .* widen a range"):
        generate_problems(1000, "evaluation", 0, count=(2, 2), numbers=(1, 5), target=(1, 9))


# The task


def small(**options: Any) -> Task:
    return CountdownConfig(**{"count": 3, "numbers": "1-12", "target": "1-60", **options}).build(seed=3)


def test_the_prompt_is_the_papers() -> None:
    assert countdown_prompt([44, 19, 35], 98) == PAPER_PROMPT


def test_task() -> None:
    task = small(train_size=300, eval_size=40)
    assert (len(task.train), len(task.evaluation)) == (300, 40)
    row = task.train[0]
    assert row["prompt"] == countdown_prompt(row["numbers"], row["target"])
    assert [function.__name__ for function in task.reward_funcs] == ["answer_reward", "format_reward"]
    assert (task.reward_weights, task.accuracy) == ([1.0, 0.1], "answer_reward")


def test_sizes_default_to_the_papers_200() -> None:
    assert len(small().train) == len(small().evaluation) == 200


def test_seeds_of_the_two_sets() -> None:
    assert small(seed=1).train != small(seed=2).train
    assert small(seed=3).train == small().train
    assert small(seed=1).evaluation == small(seed=2).evaluation != small(eval_seed=1).evaluation


def test_data_hash_sees_every_change() -> None:
    task = small()
    assert task.data_hash() == small().data_hash()
    assert len({task.data_hash(), small(train_size=199).data_hash(), small(eval_seed=1).data_hash()}) == 3
    assert data_hash([{"a": 1, "b": [2]}]) == data_hash([{"b": [2], "a": 1}]) != data_hash([{"a": 1, "b": [3]}])


def test_tasks_refuse_what_does_not_fit_together() -> None:
    rows, others = [{"prompt": "a"}], [{"prompt": "b"}]
    with pytest.raises(EstuneError, match="2 reward functions but 1 weights"):
        Task("t", rows, others, [answer_reward, format_reward], [1.0], "answer_reward")
    with pytest.raises(EstuneError, match="choose one of format_reward"):
        Task("t", rows, others, [format_reward], [1.0], "answer_reward")
    with pytest.raises(EstuneError, match="the evaluation set is empty"):
        Task("t", rows, [], [format_reward], [1.0], "format_reward")
    with pytest.raises(EstuneError, match=r'1 of 1 evaluation examples .* "a"'):
        Task("t", rows, rows, [format_reward], [1.0], "format_reward")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"count": "1-3"}, "at least 2"), ({"count": "x"}, "like 3-4"), ({"numbers": "9-1"}, "smaller number"),
        ({"train_size": 0}, "greater than"), ({"nums": 3}, "nums"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CountdownConfig(**options)


def test_every_option_is_described() -> None:
    assert all(field.description for field in CountdownConfig.model_fields.values())


@pytest.mark.parametrize("number", [3, "3", [3], (3, 3), "3-3"])
def test_ways_to_write_a_range(number: Any) -> None:
    assert CountdownConfig(count=number).count == (3, 3)


def test_importing_tasks_loads_neither_torch_nor_datasets() -> None:
    code = "import sys, estune.tasks; print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
