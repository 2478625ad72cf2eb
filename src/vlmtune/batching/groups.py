"""What rows have in common: the images they show, and all that is written in front of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vlmtune.data.splits import Records
from vlmtune.prompt.encode import Encoder


def groups_of(records: Records, encoder: Encoder) -> Sequence[Hashable]:
    """What each row shares with others: images and all that is written in front of them, or the images alone where
    rows are read when asked for. Nothing of a stream is known before it is read.
    """
    if records.on_demand:
        return records.groups()
    return [encoder.prompt.group(record) for record in records]
