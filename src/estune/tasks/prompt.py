"""The prompt of the paper's Countdown experiment, word for word."""

from collections.abc import Sequence

OPENING = (
    "You are a helpful assistant. You first think about the reasoning process in your mind and then provide the user "
    "with the answer.Using the numbers ["
)
MIDDLE = "], create an equation that equals "
CLOSING = (
    ". You can use basic arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in "
    "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 "
    "</answer>.Let me solve this step by step.\n<think>"
)


def countdown_prompt(numbers: Sequence[int], target: object) -> str:
    """The plain-string prompt (no chat template) for a problem: layout of the `context` field of arXiv 2509.24372."""
    return f"{OPENING}{' '.join(map(str, numbers))}{MIDDLE}{target}{CLOSING}"
