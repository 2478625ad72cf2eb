"""Which rows can share a prefix: those with the same images and the same text before them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vlmtune.data.splits import Records
from vlmtune.prompt.encode import Encoder


def groups_of(records: Records, encoder: Encoder) -> Sequence[Hashable]:
    """The group of each row: rows of one group have the same images and the same text before them, or just the same
    images if rows are read on demand. Rows of a stream have no groups, since they are not known in advance.
    """
    if records.on_demand:
        return records.groups()
    return [encoder.prompt.group(record) for record in records]
