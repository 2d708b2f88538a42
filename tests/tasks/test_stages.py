"""Rows of a step where a task has stages."""

from __future__ import annotations

from estune.run.order import RowOrder, StagedOrder
from estune.tasks.base import Stage

STAGES = [Stage([0, 1, 2], until_step=4), Stage([3, 4], until_accuracy={"a": 0.5}), Stage([5, 6, 7, 8])]


def test_without_stages_it_is_the_order_of_all_rows() -> None:
    order, plain = StagedOrder(10, [], 3, 7), RowOrder(10, 3, 7)
    assert [order.rows(step) for step in range(9)] == [plain.rows(step) for step in range(9)]
    assert order.used(2, 4) == sorted({row for step in (2, 3) for row in plain.rows(step)})


def test_stages_begin_at_steps_and_at_accuracies() -> None:
    order = StagedOrder(9, STAGES, 2, 7)
    low, high = {"eval_accuracy/a": 0.4}, {"eval_accuracy/a": 0.5}
    evaluations = {0: high, 4: low, 5: low, 6: high, 7: low}
    found = [order.stage(step, evaluations) for step in range(9)]
    assert found == [(0, 0)] * 4 + [(1, 4)] * 2 + [(2, 6)] * 3
    assert set(order.rows(3, evaluations)) < {0, 1, 2}
    assert set(order.rows(4, evaluations)) == {3, 4}
    assert order.rows(6, evaluations) == [5 + row for row in RowOrder(4, 2, 7).rows(0)]
    assert order.used(0, 1) == list(range(9))


def test_later_evaluations_change_nothing() -> None:
    order, high = StagedOrder(9, STAGES, 2, 7), {"eval_accuracy/a": 0.5}
    assert order.stage(5, {6: high}) == (1, 4)
    assert order.stage(5, {4: high, 6: high}) == (2, 4)
