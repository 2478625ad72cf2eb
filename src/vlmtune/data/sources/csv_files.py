"""CSV and TSV, read row by row: a fault in one row only affects that row.

Cells are texts exactly as written. A quoted cell may span lines; blank lines are skipped. After an unclosed quote, the
following rows would disappear into one cell: reading resumes at the next line that is a complete row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlmtune.data.cells import is_image
from vlmtune.data.rows import FileRows
from vlmtune.data.sources.text_files import byte_fault, read_lines
from vlmtune.errors import DataError

ENDING = re.compile(r"\.[A-Za-z0-9]{2,5}$")
LONGEST = 2**31 - 1


def read_csv(path: Path, header: Sequence[str] | None = None) -> FileRows:
    """Read the rows of a CSV, or of a TSV by its ending; `header` names the columns of one that has no header line.

    Raises DataError, with the file and line, if the header can't be used.
    """
    lines = read_lines(path)
    with _cells_of_any_length():
        return _read(lines, header, path)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """The csv module's limit of 131,072 characters per cell is too low for an image in base64."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read(lines: list[str], header: Sequence[str] | None, path: Path) -> FileRows:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    table = _Table(lines, separator)
    line, first, fault = next(table.rows(), (1, [], "it has no cells"))
    if header is None:
        if fault or (problems := _header_problems(first, line, separator)):
            problems = [fault] if fault else problems
            raise DataError([f"{path}, line {line}: {problem}" for problem in problems])
    else:
        table.next = 0
        if first == list(header):
            raise DataError(f"{path}, line {line}: is a header already; leave out data.header")
    table.columns = list(header or first)
    found = FileRows(table.columns)
    for line, cells, fault in table.rows():
        found.add(dict(zip(table.columns, cells, strict=True)) if fault is None else {}, line, fault)
    if not len(found):
        raise DataError(f"{path}: has a header and no rows")
    return found


def _header_problems(header: list[str], line: int, separator: str) -> list[str]:
    other = next((mark for mark in "\t;|," if mark in header[0] and mark != separator), None)
    if len(header) == 1 and other:
        spaces = ", skipinitialspace=True" if f"{other} " in header[0] else ""
        convert = f"pd.read_csv(..., sep={other!r}{spaces}, dtype=str, keep_default_na=False).to_csv(..., index=False)"
        end = "; a tab-separated file must be named .tsv" if other == "\t" else ""
        wanted = "commas" if separator == "," else "tabs"
        return [f"fields are separated by {other!r}; this file needs {wanted}: {convert}{end}"]
    if image := next((cell for cell in header if is_image(cell)), None):
        names = "[image_path,question,answer]"
        return [f"looks like a row, not a header ({image:.60}); name its columns in order: data.header={names}"]
    twice = sorted({name for name in header if header.count(name) > 1})
    return [f"{header.count(name)} columns are named {name!r}; rename all but one" for name in twice]


class _Table:
    """A position in a table's lines from which the csv module reads."""

    def __init__(self, lines: list[str], separator: str):
        self.lines, self.next = lines, 0
        self.sound = byte_fault("".join(lines)) is None
        """Whether no row contains an invalid byte."""
        self.separator = separator
        self.columns: list[str] | None = None
        """Number of cells per row, known once the header is read."""

    def __iter__(self) -> _Table:
        return self

    def __next__(self) -> str:
        if self.next == len(self.lines):
            raise StopIteration
        self.next += 1
        return self.lines[self.next - 1]

    def rows(self) -> Iterator[tuple[int, list[str], str | None]]:
        """For each row the line on which it begins, from 1, and its cells or its fault."""
        reader = csv.reader(self, delimiter=self.separator, strict=True)
        while self.next < len(self.lines):
            begin = self.next
            try:
                cells, fault = next(reader, []), None
            except csv.Error as error:
                cells, fault = [], _quote_fault(str(error))
            if not cells and fault is None:
                continue
            if fault is None and self.columns is not None and len(cells) != len(self.columns):
                fault = self._width_fault(cells, len(self.columns))
            if self.next - begin > 1:
                fault = self._go_back(begin, cells, fault)
            if not self.sound:
                fault = byte_fault("".join(self.lines[begin : self.next])) or fault
            yield begin + 1, cells, fault

    def _width_fault(self, cells: list[str], wanted: int) -> str:
        if len(cells) > wanted:
            advice = f'put a field that holds {"commas" if self.separator == "," else "tabs"} in quotes ("...")'
            return f"too many fields: {len(cells)} where the header has {wanted}; {advice}"
        return f"too few fields: {len(cells)} where the header has {wanted}; add what is missing"

    def _go_back(self, begin: int, cells: list[str], fault: str | None) -> str | None:
        """If a row of several lines has swallowed other rows, go back to the first of them. Returns the row's fault.

        This is the case if the row is faulty and one of its lines is a complete row; or if it looks fine, but one of
        its lines is a row whose image or other file has the same extension (`.jpg`).
        """
        if self.columns is None:
            return fault
        for number in range(begin + 1, self.next):
            alone = self._alone(self.lines[number])
            if len(alone) == len(self.columns) and (fault or _share_ending(alone, cells)):
                self.next = number
                return f'unclosed quote: a quote (") that opens here is not closed before line {number + 1}'
        return fault

    def _alone(self, line: str) -> list[str]:
        try:
            return next(csv.reader([line], delimiter=self.separator, strict=True), [])
        except csv.Error:
            return []


def _share_ending(one: list[str], other: list[str]) -> bool:
    endings = [[ENDING.search(cell.strip()) for cell in cells] for cells in (one, other)]
    return any(a and b and a[0] == b[0] for a, b in zip(*endings, strict=True))


def _quote_fault(error: str) -> str:
    if error == "unexpected end of data":
        return 'unclosed quote: a quote (") that opens in this row is never closed'
    if "new-line character" in error:
        return "stray carriage return: put a field that holds one in quotes"
    return f'stray quote: {error}; quote a field as "...", and write a quote inside it twice ("")'
