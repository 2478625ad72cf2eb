"""The user's own rows on which two ways of computing are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from vlmtune.data.records import Record
from vlmtune.prompt.encode import Encoder

MOST_SHAPES = 4
"""Number of conversation shapes to compare."""


def pairs(encoder: Encoder, records: Sequence[Record], groups: Sequence[Hashable], most: int) -> list[list[Record]]:
    """Per shape of conversation up to `most` rows: from up to two shared images at least two rows each, those with the
    shortest and longest questions. Rare shapes come first: they are the most likely to break a layout.
    """
    counts = Counter(group for group in groups if group is not None)
    rows_of: dict[Hashable, list[int]] = {group: [] for group, count in counts.most_common(1000) if count > 1}
    for row, group in enumerate(groups):
        if group in rows_of:
            rows_of[group].append(row)
    of_shape: dict[Any, list[list[int]]] = {}
    for rows in rows_of.values():
        first = records[rows[0]]
        of_shape.setdefault((encoder.prompt.shape(first), first.system is not None), []).append(rows)
    found = []
    for groups_alike in sorted(of_shape.values(), key=len)[:MOST_SHAPES]:
        chosen = [records[row] for rows in groups_alike[:2] for row in _unlike(records, rows, max(most // 2, 2))]
        found.append(chosen[: max(most, 2)])
    return found


def _unlike(records: Sequence[Record], rows: Sequence[int], most: int) -> list[int]:
    """Up to `most` of `rows`, alternating between the shortest and longest questions."""
    ordered = sorted(rows[:100], key=lambda row: len(records[row].question))
    return [ordered[-(n // 2) - 1] if n % 2 else ordered[n // 2] for n in range(min(most, len(ordered)))]
