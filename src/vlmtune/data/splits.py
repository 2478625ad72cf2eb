"""The rows of a split, whatever they come from: in memory, on disk, made when asked for, or from a stream."""

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
    """The usable rows of a split, in order. A source that makes its rows when asked for them is one of these.

    Length and items are the subclass's to give; the methods below have an answer for rows in memory.
    """

    on_demand: ClassVar[bool] = False
    """Whether a row is read or made each time it is asked for, so that going through all of them is to be avoided."""
    streamed: ClassVar[bool] = False
    """Whether rows come one after the other, so that none can be picked and nothing is known of them beforehand."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    @abstractmethod
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]: ...

    def groups(self) -> Sequence[Hashable]:
        """The group of each row; nothing of a stream."""
        return [record.group for record in self]

    def fingerprint(self) -> str:
        """Tells these rows from others."""
        return fingerprint.fingerprint(self)

    def image_fingerprint(self) -> str | None:
        """Tells what these rows' images hold from others; None where `fingerprint` does so too."""
        return fingerprint.image_fingerprint(self)

    def of_process(self, process: int, processes: int) -> Records:
        """The rows that one of several processes takes from; all of them, where any can be picked."""
        return self

    def select(self, rows: Sequence[int]) -> Records:
        """The rows at these positions."""
        return RecordList([self[row] for row in rows])

    def refusing(self, faults_of: Callable[[Record], list[str]]) -> Records:
        """These rows without those that `faults_of` finds a fault in; a stream asks when a row's turn comes."""
        return self.select([row for row, record in enumerate(self) if not faults_of(record)])

    def frame(self) -> pd.DataFrame | None:
        """The columns of these rows as their source has them; None where only the split's own frame does."""
        return None


class RecordList(Records):
    """A list of records, or any other sequence of them, which is not copied."""

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
    """The input's own columns, for predictions.csv."""
    bad: list[BadRow] = field(default_factory=list)
    repeats: list[tuple[int, int]] = field(default_factory=list)
    """Positions in `records` of rows that say the same as an earlier one, each with that one's."""

    def __len__(self) -> int:
        return len(self.records)
