"""The order of rows: each once per epoch, the same for the same seed, computed from the step's number alone."""

from __future__ import annotations

import pytest

from vlmtune.data.sampler import Order, micro_batches

GROUPS = ["a", "b", None, "a", "c", None, "a", "b", "c", "c", "d"]


def order(*, by_group: bool = False, seed: int = 0, rows_per_step: int = 4) -> Order:
    return Order(GROUPS, rows_per_step=rows_per_step, seed=seed, by_group=by_group)


def epoch(rows: Order, number: int) -> list[int]:
    return [row for step in range(rows.steps_per_epoch) for row in rows.step(number * rows.steps_per_epoch + step)]


@pytest.mark.parametrize("by_group", [False, True])
def test_each_epoch_takes_every_row_once(by_group: bool) -> None:
    rows = order(by_group=by_group)
    assert [len(rows.step(n)) for n in range(6)] == [4, 4, 3] * 2
    for number in range(5):
        assert sorted(epoch(rows, number)) == list(range(len(GROUPS)))


@pytest.mark.parametrize("by_group", [False, True])
def test_epochs_and_seeds_differ_and_repeat(by_group: bool) -> None:
    first, again, other = order(by_group=by_group), order(by_group=by_group), order(by_group=by_group, seed=1)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(other, 0)
    assert again.step(7) == first.step(7), "asked for alone, as a resumed run does"


def test_rows_of_a_group_stay_together_in_a_new_order() -> None:
    rows = order(by_group=True)
    orders = set()
    for number in range(20):
        drawn = epoch(rows, number)
        for group in ("a", "b", "c", "d"):
            places = [place for place, row in enumerate(drawn) if GROUPS[row] == group]
            assert places == list(range(places[0], places[0] + len(places)))
        orders.add(tuple(row for row in drawn if GROUPS[row] == "a"))
    assert len(orders) > 1, "rows of a group are shuffled too"


def test_micro_batches_divide_a_step_between_processes() -> None:
    rows = list(range(12))
    parts = [part for rank in range(3) for part in micro_batches(rows, batch_size=2, accumulation=2, rank=rank)]
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_short_last_step_loses_no_row() -> None:
    parts = [p for rank in range(3) for p in micro_batches([7, 8, 9], batch_size=2, accumulation=2, rank=rank)]
    assert parts == [[7, 8], [9], [], [], [], []]
