"""Sums that the embedded model guesses at, though it can work them out: estune train --task examples/sums.py."""

train = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(20, 50) for b in range(11, a + 1)]


def right(completions, answer, **_):
    """1.0 where the completion ends with the sum."""
    return [float(text.endswith(f" {gold}.")) for text, gold in zip(completions, answer, strict=True)]


def worked(completions, **_):
    """1.0 where it begins with steps."""
    return [float(text.startswith("Step by step:")) for text in completions]


rewards = [right, worked]
