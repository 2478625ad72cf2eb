"""The rows of a file, and the frame made from them.

A frame's index says where each row is: its file, the line on which it begins (0 if the file has no lines) and its
number in the file, from 1. A row that can't be read stays in the frame with empty cells, so that answers keep the order
of the input; `attrs["unread"]` has its fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20
"""The most faults that a message lists; it counts the rest."""
INDEX = ["file", "line", "row"]


@dataclass
class FileRows:
    """The rows of one file: cells by column, the line of each row, and faults by row position."""

    columns: list[str] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cells)

    def add(self, cells: dict[str, Any], line: int, fault: str | None) -> None:
        """Append a row; one with a fault has no cells."""
        if fault is not None:
            self.faults[len(self.cells)] = fault
        self.cells.append({} if fault is not None else cells)
        self.lines.append(line)

    def frame(self, path: Path) -> pd.DataFrame:
        """All rows as a frame."""
        import pandas as pd

        if not self.cells:
            raise DataError(f"{path}: has no rows")
        columns = self.columns or list(dict.fromkeys(key for row in self.cells for key in row))
        if not columns:
            faults = [f"row {position + 1}: {fault}" for position, fault in islice(self.faults.items(), SHOWN)]
            raise DataError([f"{path}: no row can be used", *faults] if faults else f"{path}: its rows are empty")
        series = {name: pd.Series([row.get(name) for row in self.cells], dtype=object) for name in columns}
        frame = pd.DataFrame(series, index=range(len(self)))
        return with_places(frame, path, self.lines, self.faults)


def with_places(
    frame: pd.DataFrame, path: Path, lines: Sequence[int] = (), faults: dict[int, str] | None = None
) -> pd.DataFrame:
    """`frame` with the index and attributes of a frame that was read from `path`."""
    import pandas as pd

    count = len(frame)
    at = pd.DataFrame({"file": str(path), "line": list(lines) or 0, "row": range(1, count + 1)})
    frame.index = pd.MultiIndex.from_frame(at)
    frame.attrs["file"] = str(path)
    frame.attrs["unread"] = {(str(path), row + 1): fault for row, fault in (faults or {}).items()}
    return frame


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The frames of several files as one, in order; a column that a file lacks is empty in its rows."""
    import pandas as pd

    if len(frames) == 1:
        return frames[0]
    whole = pd.concat([frame.astype(object) for frame in frames])
    whole = whole.where(whole.notna(), None)
    whole.attrs["unread"] = {place: fault for frame in frames for place, fault in frame.attrs["unread"].items()}
    return whole


class RowPlace(NamedTuple):
    """Where a row of a frame is in its file."""

    file: str
    line: int
    row: int
    fault: str | None


def row_places(frame: pd.DataFrame, file: str) -> Iterator[RowPlace]:
    """The place of each row of a frame. `file`: for a frame that was not read from a file."""
    unread = frame.attrs.get("unread", {})
    if list(frame.index.names) != INDEX:
        return (RowPlace(file, 0, number, None) for number in range(1, len(frame) + 1))
    return (RowPlace(name, line, row, unread.get((name, row))) for name, line, row in frame.index)
