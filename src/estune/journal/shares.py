"""Which accuracies are shares, and are therefore shown in percent: those that lie in 0 to 1 by declaration."""

from __future__ import annotations

import re

from estune.journal.journal import Journal

_ACCURACY = re.compile(r"(eval_|watch/.+/)accuracy(/|$)")


def is_share(journal: Journal, key: str) -> bool:
    """Whether a metric of evaluations is a share. Only `eval_accuracy`, `watch/TASK/accuracy` and their groups can be.

    In a journal that does not say so, which an older version wrote, it is one if it has never been outside 0 to 1.
    """
    declared = journal.header.shares
    if declared is not None:
        return any(key == share or key.startswith(f"{share}/") for share in declared)
    values = [e.metrics[key] for e in journal.evaluations if key in e.metrics]
    return _ACCURACY.match(key) is not None and all(0 <= value <= 1 for value in values)


def shown(value: float, share: bool) -> str:
    """An accuracy for people: a share in percent, anything else as it is."""
    return f"{value:.1%}" if share else f"{value:.4g}"
