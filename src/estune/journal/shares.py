"""Which accuracies are shares, and are therefore shown in percent: those that lie in 0 to 1 by declaration."""

from __future__ import annotations

import re

from estune.journal.journal import Journal


def is_share(journal: Journal, key: str) -> bool:
    """Whether a metric of evaluations is a share: `eval_accuracy` or `watch/TASK/accuracy`, or one of its groups.

    In a journal that does not say so, which an older version wrote, it is one if it has never been outside 0 to 1.
    """
    key = re.sub(r"((?:^eval_|^watch/.*/)accuracy)/.*", r"\1", key)
    if journal.header.shares is not None:
        return key in journal.header.shares
    return all(0 <= e.metrics[key] <= 1 for e in journal.evaluations if key in e.metrics)


def shown(value: float, share: bool) -> str:
    """An accuracy for people: a share in percent, anything else as it is."""
    return f"{value:.1%}" if share else f"{value:.4g}"
