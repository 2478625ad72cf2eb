"""The user's own rows on which two ways of computing are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import accumulate, islice
from typing import Any

from vlmtune.batching.order import first_rows
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.prompt.encode import Encoder

MOST_SHAPES = 4
"""Number of conversation shapes to compare."""


def sample_rows(encoder: Encoder, records: Records, trainer: TrainerConfig, *, most: int) -> list[Record]:
    """Rows that training begins with, at most as many as a micro-batch holds, in the padded layout."""
    rows = first_rows(records, trainer, most=most)
    if trainer.batch_tokens is None:
        return rows
    longest = accumulate((image + text for image, text in encoder.lengths(rows)), max)
    return rows[: max(sum(n * length <= trainer.batch_tokens for n, length in enumerate(longest, start=1)), 1)]


def pairs(
    encoder: Encoder,
    records: Sequence[Record],
    groups: Sequence[Hashable],
    most: int,
    *,
    lengths: Sequence[tuple[int, int]] = (),
    most_tokens: int | None = None,
) -> list[list[Record]]:
    """Per shape of conversation up to `most` rows: from up to two shared images at least two rows each, those with the
    shortest and longest questions. Rare shapes come first: they are the most likely to break a layout.

    With `most_tokens`, all rows of a shape together have no more in the shared layout, by the `lengths` of the rows
    (tokens of images, of text); a shape of which no two rows fit is left out. Empty if `most` is below two.
    """

    def fitting(rows: Sequence[int], images: int) -> list[int]:
        chosen: list[int] = []
        for row in _alternating(records, rows):
            tokens = images * sum(lengths[r][1] for r in [*chosen, row]) if most_tokens else 0
            if most_tokens is None or tokens + images * lengths[row][0] <= most_tokens:
                chosen.append(row)
        return chosen[: max(most // 2, 2)]

    found = []
    for groups_alike in _by_shape(encoder, records, groups) if most > 1 else []:
        for images in (2, 1):
            parts = (part for rows in groups_alike if len(part := fitting(rows, images)) > 1)
            chosen = [*islice(parts, images)]
            if len(chosen) == images:
                found.append([records[row] for part in chosen for row in part][:most])
                break
    return found[:MOST_SHAPES]


def _by_shape(encoder: Encoder, records: Sequence[Record], groups: Sequence[Hashable]) -> list[list[list[int]]]:
    """Per shape of conversation the rows of each group of several, rare shapes first."""
    counts = Counter(group for group in groups if group is not None)
    rows_of: dict[Hashable, list[int]] = {group: [] for group, count in counts.most_common(1000) if count > 1}
    for row, group in enumerate(groups):
        if group in rows_of:
            rows_of[group].append(row)
    of_shape: dict[Any, list[list[int]]] = {}
    for rows in rows_of.values():
        first = records[rows[0]]
        of_shape.setdefault((encoder.prompt.shape(first), first.system is not None), []).append(rows)
    return sorted(of_shape.values(), key=len)


def _alternating(records: Sequence[Record], rows: Sequence[int]) -> list[int]:
    """Up to 100 of `rows`, alternating between the shortest and longest questions."""
    ordered = sorted(rows[:100], key=lambda row: len(records[row].question))
    return [ordered[-(n // 2) - 1] if n % 2 else ordered[n // 2] for n in range(len(ordered))]
