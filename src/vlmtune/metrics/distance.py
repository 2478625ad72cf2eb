"""Edit distance of two sequences, and the best pairing of two lists."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def levenshtein(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn `left` into `right`.

    A column of the usual table is held in two integers, one bit per item of `left`, so that a page of text takes
    milliseconds. Source: Hyyrö 2001, Explaining and Extending the Bit-parallel Approximate String Matching Algorithm of
    Myers.

    >>> levenshtein("kitten", "sitting")
    3
    """
    if not left:
        return len(right)
    places: dict[Hashable, int] = {}
    for at, item in enumerate(left):
        places[item] = places.get(item, 0) | 1 << at
    full, last = (1 << len(left)) - 1, 1 << len(left) - 1
    more, less, distance = full, 0, len(left)  # where the value above is one less, and one more, than here
    for item in right:
        equal = places.get(item, 0)
        same = (((equal & more) + more) ^ more) | equal | less
        up, down = less | (full & ~(same | more)), more & same
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & full, down << 1 & full
        more, less = down | (full & ~(same | up)), up & same
    return distance


def best_pairs(gains: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column), each row and column at most once, with the greatest sum of gains `[rows, columns]`.

    As many pairs as the shorter side has. Source: Kuhn 1955, The Hungarian Method, in the form with shortest
    augmenting paths, of cubic time.

    >>> best_pairs([[0.9, 0.8], [0.9, 0.1]])
    [(0, 1), (1, 0)]
    """
    if not gains or not gains[0]:
        return []
    if len(gains) > len(gains[0]):
        turned = [list(column) for column in zip(*gains, strict=True)]
        return sorted((row, column) for column, row in best_pairs(turned))
    rows, columns = len(gains), len(gains[0])
    of_row, of_column, owner = [0.0] * (rows + 1), [0.0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        path = _shortest_path(gains, row, of_row, of_column, owner)
        column = path[0]
        while column:
            before = path[column]
            owner[column] = owner[before] if before else row
            column = before
    return sorted((owner[column] - 1, column - 1) for column in range(1, columns + 1) if owner[column])


def _shortest_path(
    gains: Sequence[Sequence[float]], row: int, of_row: list[float], of_column: list[float], owner: list[int]
) -> list[int]:
    """Each column's predecessor on the cheapest way from `row` to a free column, which is that of place 0.

    Rows and columns count from 1; `of_row` and `of_column` are the potentials, and are updated.
    """
    columns = len(of_column) - 1
    least, before, used = [float("inf")] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
    owner[0], here = row, 0
    while True:
        used[here], there, step = True, 0, float("inf")
        for column in range(1, columns + 1):
            if used[column]:
                continue
            cost = -gains[owner[here] - 1][column - 1] - of_row[owner[here]] - of_column[column]
            if cost < least[column]:
                least[column], before[column] = cost, here
            if least[column] < step:
                step, there = least[column], column
        for column in range(columns + 1):
            if used[column]:
                of_row[owner[column]] += step
                of_column[column] -= step
            else:
                least[column] -= step
        here = there
        if not owner[here]:
            return [here, *before[1:]]
