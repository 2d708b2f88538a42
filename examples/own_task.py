"""A task of your own: rows, and reward functions that grade completions. Here, to answer correctly and in few words.

python examples/own_task.py [SETTING=VALUE ...]
"""

import sys
from typing import Any

from estune import Task, Trainer
from estune.config import load

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Russia": "Moscow",
    "Cuba": "Havana",
    "Peru": "Lima",
}
TRAINED = ("Can you tell me {}?", "I would like to know {}.", "Please tell me, what is {}?", "Do you know {}?")
HELD_OUT = ("I have a question for you: what is {}?",)


def rows(questions: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row has a prompt, here a conversation, and whatever columns the reward functions want."""
    return [
        {"prompt": [{"role": "user", "content": question.format(f"the capital of {country}")}], "answer": capital}
        for question in questions
        for country, capital in CAPITALS.items()
    ]


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the answer is in the completion. Columns arrive as lists, one value for each completion."""
    return [float(right in messages[-1]["content"]) for messages, right in zip(completions, answer, strict=True)]


def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """From 1.0 for nothing down to 0.0 for 128 tokens or more."""
    return [max(0.0, 1 - len(ids) / 128) for ids in completion_ids]


task = Task(
    name="capitals",
    train=rows(TRAINED),
    evaluation=rows(HELD_OUT),
    reward_funcs=[correct, short],
    reward_weights=[1.0, 1.0],
    accuracy="correct",
)
settings = ["steps=20", "prompts_per_step=64", "max_new_tokens=128", *sys.argv[1:]]
summary = Trainer(load(overrides=settings), task=task).train()
length = "eval_completions/mean_length"
print(f"mean length {summary.before[length]:.0f} -> {summary.after[length]:.0f} tokens")
print(f"accuracy {summary.before['eval_accuracy']:.1%} -> {summary.after['eval_accuracy']:.1%}")
