"""Numbers as people say them."""

from __future__ import annotations

import pytest

from estune.charts.words import DAY, amount, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"), (0.0123, "12.3 ms"), (0.999, "999 ms"), (1, "1 s"), (9.704, "9.7 s"), (42.42, "42.4 s"),
        (89.9, "89.9 s"), (90, "1.5 min"), (5399, "90 min"), (5400, "1.5 h"), (1.49 * DAY, "35.8 h"),
        (1.5 * DAY, "1.5 days"), (1234 * DAY, "1,234 days"), (-0.5, "-500 ms"), (float("nan"), "nan ms"),
    ],
)  # fmt: skip
def test_times_have_three_digits(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_one_of_something_is_not_several() -> None:
    assert [amount(n, "steps") for n in (0, 1, 2, 12345)] == ["0 steps", "1 step", "2 steps", "12,345 steps"]
    assert [amount(n, "steps more") for n in (1, 2)] == ["1 step more", "2 steps more"]
