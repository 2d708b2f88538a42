"""Tasks of a user's own: a Python file, or prompts and rewards by name, or a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import estune
from estune.completion import Completion
from estune.config import load
from estune.errors import EstuneError
from estune.grading.convention import Batch, TrainerState
from estune.tasks.base import Task, data_hash
from estune.tasks.custom import CustomConfig
from estune.tasks.mix import MixConfig
from estune.tasks.options import identity
from estune.tasks.own import OwnConfig
from estune.tasks.preference import PreferenceConfig

EMBEDDED = Path(estune.__file__).parent / "models" / "tiny"
EXAMPLE = Path(__file__).parents[2] / "examples" / "sums.py"

REWARDS = """
def right(completions, answer, **_):
    return [float(gold in text) for text, gold in zip(completions, answer)]

def brief(completions, **_):
    return [-len(text) / 100 for text in completions]
"""
NAMES = f"{REWARDS}\ntrain = [{{'prompt': f'{{n}}+1=', 'answer': str(n + 1)}} for n in range(100)]\n"
FUNCTION = (
    REWARDS
    + """
from estune import Task

def task(seed, size=10):
    rows = [{"prompt": f"{seed} {n}", "answer": str(n)} for n in range(size + 2)]
    return Task("mine", rows[2:], rows[:2], [right], [1.0], "right")
"""
)


def own(folder: Path, text: str, **options: Any) -> Task:
    path = folder / f"own_{abs(hash(text))}.py"
    path.write_text(text)
    return OwnConfig(name=str(path), **options).build(3)


def test_names_make_a_task(tmp_path: Path) -> None:
    task = own(tmp_path, f"{NAMES}\nrewards = [right, brief]\n")
    assert len(task.train) + len(task.evaluation) == 100
    assert 4 < len(task.evaluation) < 25
    assert (task.accuracies, task.reward_weights) == (["right"], [1.0, 1.0])
    assert task.name.endswith(".py")


def test_few_rows_of_which_none_is_held_out(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match=r"of 2 rows none is; give more rows, or the name evaluation in the file"):
        own(tmp_path, NAMES.replace("range(100)", "range(2, 4)") + "rewards = right")


def test_all_names(tmp_path: Path) -> None:
    more = "rewards = [right, brief]\nweights = [2, 3]\naccuracy = 'brief'\ngold = lambda row: row['answer']\n"
    text = f"{NAMES}\n{more}evaluation = [{{'prompt': 'x', 'answer': 'y'}}]\n"
    task = own(tmp_path, text, train_size=7)
    assert (len(task.train), task.evaluation) == (7, [{"prompt": "x", "answer": "y"}])
    assert (task.reward_weights, task.accuracies) == ([2, 3], ["brief"])
    assert task.gold is not None
    assert task.gold(task.train[0]) == "1"


def test_rows_may_be_a_file_and_rewards_names(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "1"}) + "\n" for n in range(50)))
    graders = tmp_path / "graders.py"
    graders.write_text(REWARDS)
    task = own(tmp_path, f"train = {str(data)!r}\nrewards = [{str(graders) + ':brief'!r}]\n")
    assert task.reward_funcs[0](completions=["ab"]) == [-0.02]


USER = [{"role": "user", "content": "3 2"}]


@pytest.mark.parametrize(
    ("text", "options", "shown"),
    [
        (FUNCTION, {}, USER),
        (FUNCTION, {"chat": False}, "3 2"),
        (FUNCTION.replace('"right")', '"right", chat=False)'), {}, "3 2"),
        (FUNCTION.replace('"right")', '"right", chat=False)'), {"chat": True}, USER),
        (NAMES.replace("f'{n}+1='", "f'3 {n}'") + "rewards = right", {}, USER),
        (NAMES.replace("f'{n}+1='", "f'3 {n}'") + "rewards = right\nchat = False", {}, "3 2"),
        (
            NAMES.replace("f'{n}+1='", "[dict(role='user', content=f'3 {n}')]") + "rewards = right",
            {"chat": False},
            USER,
        ),
    ],
)
def test_text_is_text_for_rewards_and_a_users_message_for_the_model(
    tmp_path: Path, text: str, options: dict[str, Any], shown: Any
) -> None:
    task = own(tmp_path, text, **options)
    row = next(row for row in (*task.train, *task.evaluation) if row["prompt"] in ("3 2", USER))
    assert task.shown(row, template=True) == shown
    assert task.shown(row, template=False) == row["prompt"]
    columns = Batch([row], [Completion("5", [1], finished=True)], TrainerState()).columns
    said: Any = "5" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": "5"}]
    assert (columns["prompts"], columns["completions"]) == ([row["prompt"]], [said])


def test_a_mix_shows_each_task_as_it_is_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"{NAMES}rewards = right")
    name = str(tmp_path / "a.py")
    mix = MixConfig.model_validate({"tasks": {"chat": {"name": name}, "plain": {"name": name, "chat": False}}}).build(0)
    kinds = {(row["task"], type(mix.shown(row, template=True))) for row in mix.train}
    assert kinds == {("chat", list), ("plain", str)}
    assert {type(row["prompt"]) for row in mix.train} == {str}


def test_data_are_hashed_as_they_are_shown(tmp_path: Path) -> None:
    """So that journals from before text stayed text, and their hashes, still tell the same data."""
    plain = own(tmp_path, f"{NAMES}rewards = right", chat=False)
    assert plain.data_hash() == data_hash([*plain.train, {"side": "evaluation"}, *plain.evaluation])
    chat = own(tmp_path, f"{NAMES}rewards = right")
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in chat.train]
    held_out = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in chat.evaluation]
    assert chat.data_hash() == data_hash([*rows, {"side": "evaluation"}, *held_out]) != plain.data_hash()


@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_are_not_passed_over(column: str) -> None:
    def task(value: Any) -> Task:
        rows = [{"prompt": "a", column: None}, {"prompt": "b", column: value}]
        return Task("mine", rows, [], [print], [1.0], None)

    for nothing in (None, [], [None]):
        assert len(task(nothing).train) == 2
    for picture in ("x.png", [b"PNG"], {"bytes": b"PNG"}):
        with pytest.raises(EstuneError, match=f"task mine: training row 1: {column}"):
            task(picture)


def test_a_function_makes_a_task_under_the_files_name(tmp_path: Path) -> None:
    task = own(tmp_path, FUNCTION, options={"size": 5}, train_size=4)
    assert (len(task.train), len(task.evaluation)) == (4, 2)
    assert task.train[0]["prompt"] == "3 2"
    assert task.name.endswith(".py")


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        ("x = 1", {}, r"own_\d+\.py: no train; the file needs a function task\(seed\), or the names train and rewards"),
        (NAMES, {}, r"\.py: no rewards;"),
        (
            "def right(completions, **_): return []",
            {},
            r"rewards alone go to task\.rewards: .* --task\.rewards .*\.py:FUNCTION",
        ),
        (NAMES + "rewards = []", {}, r"\.py: rewards is empty"),
        (NAMES + "rewards = [right]\naccuracy = 'wrong'", {}, r"\.py: accuracy is 'wrong'; choose one of right"),
        (NAMES + "rewards = [right]", {"options": {"a": 1}}, r"\.py: task.options are for a function"),
        ("rewards = [print]\ntrain = [{'prompt': 'x'}, {'text': 'y'}]", {}, r"\.py: train row 1 has no prompt"),
        ("def task(seed): return 1", {}, r"\.py: its function task gave int, not a Task"),
        ("def task(seed): return 1 / 0", {}, r"\.py: its function task raised ZeroDivisionError: division by zero"),
        ("import nothing_like_it", {}, r"own_\d+\.py cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, text: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint) as caught:
        own(tmp_path, text, **options)
    assert "\n" not in str(caught.value)


def test_a_task_may_hold_data_sets(tmp_path: Path) -> None:
    text = FUNCTION.replace('Task("mine", rows[2:], rows[:2]', 'Task("mine", Dataset.from_list(rows[2:]), rows[:2]')
    text = text.replace(
        "    rows =", "    from datasets import Dataset\n    rows ="
    )  # not at once: graders load such files
    task = own(tmp_path, text, train_size=4)
    assert [row["answer"] for row in task.train] == ["2", "3", "4", "5"]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(EstuneError, match=r"task nowhere/x\.py: no such file here"):
        OwnConfig(name="nowhere/x.py").build(0)


def test_the_example() -> None:
    task = OwnConfig(name=str(EXAMPLE)).build(0)
    completions = ["Step by step: 31+20=51, 51+1=52. The answer is 52.", "About 50.", "The answer is 152."]
    columns = {"completions": completions, "answer": ["52"] * 3}
    assert [f(**columns) for f in task.reward_funcs] == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def custom(folder: Path, **options: Any) -> Task:
    data, graders = folder / "rows.jsonl", folder / "graders_of_custom.py"
    data.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"{n}"}) + "\n" for n in range(60)))
    graders.write_text(REWARDS)
    usual = {"data": str(data), "rewards": f"{graders}:right,{graders}:brief", "prompt_column": "question"}
    return CustomConfig(**{**usual, **options}).build(0)


def test_custom(tmp_path: Path) -> None:
    task = custom(tmp_path, reward_weights="1,0.5", gold_column="answer", system_prompt="Hm.", accuracy="brief")
    assert len(task.train) + len(task.evaluation) == 60
    row = task.train[0]
    assert row["prompt"] == row["question"]
    conversation = [{"role": "system", "content": "Hm."}, {"role": "user", "content": row["question"]}]
    assert task.shown(row, template=True) == conversation
    assert task.shown(row, template=False) == f"Hm.\n\n{row['question']}"
    assert (task.reward_weights, task.accuracies) == ([1.0, 0.5], ["brief"])
    assert task.gold is not None
    assert task.gold(row) == row["answer"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rewards": ""}, "no reward; name some in task.rewards"),
        ({"rewards": "nothing.like.it"}, "nothing.like.it"),
        ({"reward_weights": [1]}, "2 reward functions but 1 weights"),
        ({"prompt_column": "prompt"}, "no column prompt; .* question; rename one, or name it by task.prompt_column"),
        ({"gold_column": "gold"}, "no column gold"),
        ({"data": None}, "task custom: no data; give task.data"),
    ],
)
def test_mistakes_of_custom(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        custom(tmp_path, **options)


def test_gold_answers_may_be_numbers(tmp_path: Path) -> None:
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{n}", "answer": n}) + "\n" for n in range(60)))
    task = custom(tmp_path, data=str(data), gold_column="answer")
    assert task.gold is not None
    assert task.gold(task.train[0]) == str(task.train[0]["answer"])


def test_a_gold_answer_that_is_no_number_is_none(tmp_path: Path) -> None:
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(f'{{"question": "q{n}", "answer": {n if n % 2 else "NaN"}}}\n' for n in range(60)))
    task = custom(tmp_path, data=str(data), gold_column="answer")
    assert task.gold is not None
    assert {task.gold(row) for row in task.train if int(row["question"][1:]) % 2 == 0} == {None}


def test_the_same_prompt_in_parts_is_held_out_alike() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2+2?"}]}]
    assert identity({"prompt": parts}) == identity({"prompt": "what is 2+2?"}) == "what is 2+2?"


@pytest.mark.parametrize("text", ["x = (", "raise RuntimeError('two\\nlines')"])
def test_a_module_of_rewards_that_fails(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_rewards.py").write_text(text)
    with pytest.raises(EstuneError, match=r"reward broken_rewards\.f: (SyntaxError|RuntimeError: two lines)") as caught:
        custom(tmp_path, rewards="broken_rewards.f")
    assert "\n" not in str(caught.value)


def test_preference_needs_a_reward_model(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="give task.reward_model"):
        PreferenceConfig().build(0)


def test_preference(tmp_path: Path) -> None:
    """A tiny random classifier, saved as any reward model is."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.save_pretrained(tmp_path / "judge")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, num_labels=1)  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {n}", "chosen": "x"}) + "\n" for n in range(60)))
    task = PreferenceConfig(data=str(data), reward_model=str(tmp_path / "judge"), chat=False).build(0)
    assert set(task.train[0]) == {"prompt"}
    given = task.reward_funcs[0](prompts=["say", "say"], completions=["hi", "no"])
    assert len(given) == 2
    assert given[0] != given[1]


def test_a_single_reward_needs_no_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    rows = "train = [{'prompt': str(i)} for i in range(64)]"
    file.write_text(f"{rows}\ndef rewards(completions, **_): return [0.5] * len(completions)\n")
    task = load(None, [f"task={file}"]).task.build(0)
    assert [function([""]) for function in task.reward_funcs] == [[0.5]]
