"""Which accuracies are shares, and are therefore shown in percent: those that lie in 0 to 1 by declaration."""

from __future__ import annotations

import re

from estune.journal.journal import Journal

_ACCURACY = re.compile(r"(eval_accuracy|watch/.*?/accuracy)(?:/.*)?")


def is_share(journal: Journal, key: str) -> bool:
    """Whether a metric of evaluations is a share. Only `eval_accuracy`, `watch/TASK/accuracy` and their groups can be.

    In a journal that does not say so, which an older version wrote, it is one if it has never been outside 0 to 1.
    """
    found = _ACCURACY.fullmatch(key)
    if found is None:
        return False
    if journal.header.shares is not None:
        return found[1] in journal.header.shares
    return all(0 <= e.metrics[key] <= 1 for e in journal.evaluations if key in e.metrics)


def shown(value: float, share: bool) -> str:
    """An accuracy for people: a share in percent, anything else as it is."""
    return f"{value:.1%}" if share else f"{value:.4g}"
