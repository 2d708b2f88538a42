"""A task in a file: sums that the embedded model guesses at, though it can work them out.

estune train --task examples/sums.py
"""

from typing import Any

train = [
    {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
    for a in range(20, 50)
    for b in range(11, a + 1)
]


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the completion ends with the sum."""
    texts = [messages[-1]["content"] for messages in completions]
    return [float(text.endswith(f" {gold}.")) for text, gold in zip(texts, answer, strict=True)]


def worked(completions: list[Any], **_: Any) -> list[float]:
    """1.0 where there are steps."""
    return [float("Step by step" in messages[-1]["content"]) for messages in completions]


rewards = [right, worked]
weights = [1.0, 0.2]
