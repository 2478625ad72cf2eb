"""The rows of a split, whatever their source: in memory, on disk, created on demand, or from a stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, overload

from vlmtune.data import fingerprint
from vlmtune.data.records import BadRow, Record

if TYPE_CHECKING:
    import pandas as pd


class Records(Sequence[Record]):
    """The usable rows of a split, in order. Sources that create rows on demand subclass this.

    Subclasses define length and items; the methods below have defaults for rows in memory.
    """

    on_demand: ClassVar[bool] = False
    """Whether a row is read or created at each access, so that iterating over all rows is slow."""
    streamed: ClassVar[bool] = False
    """Whether rows can only be read in sequence, so that nothing is known about them in advance."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    @abstractmethod
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]: ...

    def groups(self) -> Sequence[Hashable]:
        """The group of each row; empty for a stream."""
        return [record.group for record in self]

    def fingerprint(self) -> str:
        """A hash that identifies these rows."""
        return fingerprint.fingerprint(self)

    def image_fingerprint(self) -> str | None:
        """A hash of the content of these rows' images; None if `fingerprint` covers it."""
        return fingerprint.image_fingerprint(self)

    def of_process(self, process: int, processes: int) -> Records:
        """The rows for one of several processes; all rows if they can be accessed by number."""
        return self

    def select(self, rows: Sequence[int]) -> Records:
        """The rows at these positions."""
        return RecordList([self[row] for row in rows])

    def refusing(self, faults_of: Callable[[Record], list[str]]) -> Records:
        """These rows without those in which `faults_of` finds a fault; a stream checks each row when it is read."""
        return self.select([row for row, record in enumerate(self) if not faults_of(record)])

    def frame(self) -> pd.DataFrame | None:
        """The columns of these rows in their source; None if only the split's frame has them."""
        return None


class RecordList(Records):
    """A list or any other sequence of records; it is not copied."""

    def __init__(self, rows: Sequence[Record]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self.rows[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)


@dataclass
class Split:
    """Rows of one split, in order."""

    records: Records
    frame: pd.DataFrame | None = None
    """The columns of the input, for predictions.csv."""
    bad: list[BadRow] = field(default_factory=list)
    repeats: list[tuple[int, int]] = field(default_factory=list)
    """Positions in `records` of rows that repeat an earlier one, each with the earlier position."""

    def __len__(self) -> int:
        return len(self.records)


def images_of(records: Records) -> list[Hashable]:
    """What tells the image of each row: rows about one image are no independent samples."""
    return [row if group is None else group for row, group in enumerate(records.groups())]
