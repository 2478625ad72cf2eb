"""What rows have in common: the images they show, and all that is written in front of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vlmtune.data.records import Record
from vlmtune.prompt.encode import Encoder


def is_streamed(records: Sequence[Record]) -> bool:
    """Whether rows are read when their turn comes."""
    return bool(getattr(records, "in_order", False))


def groups_of(records: Sequence[Record], encoder: Encoder) -> list[Hashable]:
    """What each row shares with others: images and all that is written in front of them, or the images alone where
    rows are read from disk. Nothing of a stream is known before it is read.
    """
    if is_streamed(records):
        return []
    return getattr(records, "groups", None) or [encoder.prompt.group(record) for record in records]
