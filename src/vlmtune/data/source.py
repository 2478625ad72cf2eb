"""Turns whatever `data._target_` returns for a split into a source, which is audited into a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.audit import audit_frame
from vlmtune.data.records import Record
from vlmtune.data.splits import RecordList, Records, Split
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class Source(Protocol):
    """The rows of one split before the audit. Sources that are larger than memory implement this themselves."""

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int) -> Split:
        """The usable rows, and the bad ones with their reasons. Raises DataError if nothing can be read.

        `config.image_root` is that of this split. Without `answers_required`, rows may lack answers.
        """


class FrameSource:
    """A frame, read from files or returned by a user's function."""

    def __init__(self, frame: pd.DataFrame, name: str):
        self.frame, self.name = frame, name

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int) -> Split:
        return audit_frame(self.frame, config, task, self.frame.attrs.get("file", self.name), answers_required)


class RecordSource:
    """Records that a user's function returned: they are used as they are."""

    def __init__(self, records: Sequence[Record], name: str):
        self.records, self.name = records, name

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int) -> Split:
        if config.on_duplicate != "keep":
            raise DataError(f"data.on_duplicate: has no effect on the records of {self.name}; leave it out")
        return Split(self.records if isinstance(self.records, Records) else RecordList(self.records))


def source_of(rows: Any, name: str) -> Source | None:
    """The rows of the split `name` as a source; None if rows can't be read from them."""
    import pandas as pd

    if isinstance(rows, pd.DataFrame):  # first: a frame has its columns as attributes, and one may be called "audit"
        return FrameSource(rows, name)
    if isinstance(rows, Source):
        return rows
    return RecordSource(rows, name) if isinstance(rows, Sequence) else None
