"""CSV files as frames of text, exactly as written, each row knowing its line.

No value is guessed at: "NA", "None", "007" and "1.0" are answers like others. What can't be a UTF-8 CSV with one
header and equally long rows is refused with its line.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.data.images import whats_there
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20
"""Faults of one file that a message lists before it counts the rest."""


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file into a frame of strings. Its index, `line`, is each row's first line; `attrs["file"]` the path.

    Raises DataError that names the file and the lines at fault.
    """
    import pandas as pd

    header, rows, lines = _parsed(_text(path), path)
    frame = pd.DataFrame(rows, columns=header, index=pd.Index(lines, name="line", dtype=int))
    frame.attrs["file"] = str(path)
    return frame


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {whats_there(path)}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a CSV file is needed here") from None
    if not content.strip():
        raise DataError(f"{path}: is empty; a header and rows are needed")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataError(f"{path}, line {line}: holds NUL bytes (UTF-16, or a spreadsheet); save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        convert = f"iconv -f WINDOWS-1252 -t UTF-8 {path} > new.csv"
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save it as UTF-8, or: {convert}"
        ) from None


def _parsed(text: str, path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line on which each row begins. A quoted field may span lines; blank lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    table: list[list[str]] = []
    lines: list[int] = []
    begin = 1
    try:
        for row in reader:
            if row:
                table.append(row)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(_broken(path, begin, str(error))) from None
    header, *rows = table
    if problems := _header_problems(header, path) or _ragged(header, rows, lines[1:], path):
        raise DataError(problems)
    if not rows:
        raise DataError(f"{path}: has a header and no rows")
    return header, rows, lines[1:]


def _broken(path: Path, line: int, error: str) -> str:
    if error == "unexpected end of data":
        return f'{path}, line {line}: a quote (") opened in the row that begins here is never closed'
    return f'{path}, line {line}: {error}; quote a field as "...", and write a quote inside it twice ("")'


def _header_problems(header: list[str], path: Path) -> list[str]:
    separator = next((mark for mark in "\t;|" if mark in header[0]), None)
    if len(header) == 1 and separator:
        convert = f"pd.read_csv(..., sep={separator!r}, dtype=str, keep_default_na=False).to_csv(..., index=False)"
        return [f"{path}, line 1: fields are separated by {separator!r}; a CSV has commas: {convert}"]
    twice = sorted({name for name in header if header.count(name) > 1})
    return [f"{path}, line 1: {header.count(name)} columns are called {name!r}; rename all but one" for name in twice]


def _ragged(header: list[str], rows: list[list[str]], lines: list[int], path: Path) -> list[str]:
    wrong = [(line, row) for line, row in zip(lines, rows, strict=True) if len(row) != len(header)]
    found = [
        f"{path}, line {line}: {len(row)} fields where the header has {len(header)}; "
        + ('put a field that holds commas in quotes ("...")' if len(row) > len(header) else "add the missing commas")
        for line, row in wrong[:SHOWN]
    ]
    return found + ([f"{path}: and {len(wrong) - SHOWN} more such rows"] if len(wrong) > SHOWN else [])
