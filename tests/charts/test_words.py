"""Numbers as people say them."""

from __future__ import annotations

import pytest

from estune.charts.words import DAY, amount, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"), (0.0123, "12.3 ms"), (0.25, "0.25 s"), (9.7, "9.7 s"), (42.4, "42 s"), (89, "89 s"),
        (90, "1.5 min"), (5000, "83.3 min"), (7200, "2 h"), (1.5 * DAY, "1.5 days"), (1234 * DAY, "1,234 days"),
    ],
)  # fmt: skip
def test_times_have_two_or_three_digits(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_one_of_something_is_not_several() -> None:
    assert [amount(n, "steps") for n in (0, 1, 2, 12345)] == ["0 steps", "1 step", "2 steps", "12,345 steps"]
    assert [amount(n, "steps more") for n in (1, 2)] == ["1 step more", "2 steps more"]
