"""Answers of which no word is too many, measured over all of them at once: see docs/rewards.md."""

import re
from collections import Counter

from estune.grading import corpus_level

train = "examples/facts.jsonl"


@corpus_level
def micro_f1(completions, answer, **_):
    """F1 of the words of all completions together against those of the answers."""
    shared = said = wanted = 0
    for text, gold in zip(completions, answer, strict=True):
        words, right = (Counter(re.findall(r"\w+", each.lower())) for each in (text, gold))
        shared += (words & right).total()
        said += words.total()
        wanted += right.total()
    return 2 * shared / (said + wanted)


rewards = [micro_f1]
