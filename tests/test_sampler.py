"""The order of rows: each once per epoch, the same for the same seed, computed from the step's number alone."""

from __future__ import annotations

import pytest

from vlmtune.batching.order import ByTokens, Cut, InOrder, Order

GROUPS = ["a", "b", None, "a", "c", None, "a", "b", "c", "c", "d"]


def order(*, by_group: bool = False, seed: int = 0, rows_per_step: int = 4) -> Order:
    return Order(GROUPS, Cut(rows_per_step, rows_per_step), seed=seed, by_group=by_group)


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
    cut = Cut(batch_size=2, rows_per_step=12, processes=3)
    parts = [part for process in range(3) for part in cut.passes(rows, process)]
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_any_number_of_processes_shares_the_same_rows_evenly(processes: int, batch_size: int) -> None:
    """With as many passes on each: none waits for another's."""
    cut = Cut(batch_size, 10, processes)
    for count in range(1, 11):
        rows = list(range(100, 100 + count))
        parts = [cut.passes(rows, process) for process in range(processes)]
        assert [row for own in parts for part in own for row in part] == rows
        sizes = [sum(map(len, own)) for own in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {len(own) for own in parts} == {-(-max(sizes) // batch_size)}
        assert max(len(part) for own in parts for part in own) <= batch_size


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_reads_the_same_rows_of_a_stream(processes: int) -> None:
    stream = InOrder(Cut(2, 6, processes))
    for step in range(4):
        parts = [stream.passes(step, process) for process in range(processes)]
        rows = [row * processes + rank for rank, own in enumerate(parts) for part in own for row in part]
        assert sorted(rows) == stream.step(step) == list(range(6 * step, 6 * step + 6))
        assert len({len(own) for own in parts}) == 1
    for rank in range(processes):
        read = [row for step in range(4) for part in stream.passes(step, rank) for row in part]
        assert read == list(range(len(read))), "each process reads its part in order"


# ---------------------------------------------------------------- by tokens

LENGTHS = [(16 * (1 + row // 3 % 4), 5 + row % 3) for row in range(300)]
SHOWN = [row // 3 for row in range(300)]


def by_tokens(*, by_group: bool, seed: int = 0, processes: int = 1, batch_tokens: int = 300) -> ByTokens:
    return ByTokens(
        LENGTHS, SHOWN, batch_tokens=batch_tokens, passes_per_step=4, processes=processes, seed=seed, by_group=by_group
    )


@pytest.mark.parametrize("by_group", [False, True])
def test_forward_passes_hold_each_row_once_an_epoch_within_the_tokens(by_group: bool) -> None:
    order = by_tokens(by_group=by_group)
    for epoch in range(3):
        passes = [rows for step in order.epoch(epoch) for rows in step]
        assert sorted(row for rows in passes for row in rows) == list(range(300))
        for rows in passes:
            units = [[row for row in rows if SHOWN[row] == image] for image in {SHOWN[row] for row in rows}]
            longest = max(map(order.cost, units)) if by_group else max(sum(LENGTHS[row]) for row in rows)
            assert longest * (len(units) if by_group else len(rows)) <= 300
    assert order.epoch(0) != order.epoch(1), "other company each epoch"


def test_near_lengths_come_together() -> None:
    order = by_tokens(by_group=False)
    passes = [rows for step in order.epoch(0) for rows in step]
    computed = sum(max(sum(LENGTHS[row]) for row in rows) * len(rows) for rows in passes)
    assert 1 - sum(map(sum, LENGTHS)) / computed < 0.1, "shuffled rows would pad a third"
    firsts = [sum(LENGTHS[rows[0]]) for rows in passes]
    assert firsts != sorted(firsts), "short ones don't all come first"


def test_steps_by_tokens_count_on_over_epochs() -> None:
    order = by_tokens(by_group=True, seed=3)
    total = order.steps_in(3)
    assert total == sum(len(order.epoch(epoch)) for epoch in range(3))
    rows = [row for step in range(total) for row in order.step(step)]
    assert all(rows.count(row) == 3 for row in range(300))
    assert [step for step in range(1, total + 1) if order.ends_epoch(step)][-1] == total
    assert sum(order.ends_epoch(step) for step in range(1, total + 1)) == 3
    assert by_tokens(by_group=True, seed=3).step(total - 1) == order.step(total - 1), "a function of seed and step"
    assert order.steps_in(0.5) == -(-len(order.epoch(0)) // 2)


def test_a_part_of_an_epoch_is_not_rounded_up_twice() -> None:
    """In floats, 0.55 * 100 is more than 55, and 1.1 - 1 more than 0.1."""
    assert Order(range(100), Cut(1, 1), seed=0, by_group=False).steps_in(0.55) == 55
    tokens = ByTokens([(0, 1)] * 10, range(10), batch_tokens=1, passes_per_step=1, seed=0, by_group=False)
    assert tokens.steps_in(1.1) == 11


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_passes_by_tokens_are_shared_by_processes(processes: int) -> None:
    order, alone = by_tokens(by_group=False, processes=processes), by_tokens(by_group=False)
    for step in range(order.steps_in(1)):
        parts = [order.passes(step, rank) for rank in range(processes)]
        assert len({len(own) for own in parts}) == 1
        assert [rows for own in parts for rows in own if rows] == alone.passes(step, 0)


def test_a_group_longer_than_the_tokens_goes_in_pieces_and_a_row_alone() -> None:
    order = by_tokens(by_group=True, batch_tokens=70)
    assert max(map(order.cost, order.units)) > 70, "a row of 71 tokens can't be cut"
    assert all(order.cost(unit) <= 70 or len(unit) == 1 for unit in order.units)
