"""Files as frames, each row knowing its line: CSV, JSON, JSON lines and Parquet, by their ending.

The cells of a CSV are texts, exactly as written; those of the others are what they are. No value is guessed at: "NA",
"None", "007" and "1.0" are answers like others. What can't be a UTF-8 CSV with one header and equally long rows is
refused with its line.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.arrow import values
from vlmtune.data.cells import from_json
from vlmtune.data.images import whats_there
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20
"""Faults of one file that a message lists before it counts the rest."""


def read_table(path: Path) -> pd.DataFrame:
    """Read a file into a frame. Its index, `line`, is each row's first line, where rows have lines; `attrs["file"]` is
    the path.

    Raises DataError that names the file and the lines at fault.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: ends in none of {', '.join(READERS)}, so its form isn't known")
    return reader(path)


def _frame(rows: list[Any], lines: list[int] | None, path: Path) -> pd.DataFrame:
    import pandas as pd

    wrong = [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if wrong:
        raise DataError([f"{path}, row {number}: is no object ({{...}})" for number in wrong[:SHOWN]])
    if not rows:
        raise DataError(f"{path}: has no rows")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in columns}
    frame = pd.DataFrame(cells)
    if lines is not None:
        frame.index = pd.Index(lines, name="line", dtype=int)
    frame.attrs["file"] = str(path)
    return frame


def read_json(path: Path) -> pd.DataFrame:
    """Read a JSON list of objects."""
    text = _text(path)
    try:
        rows = from_json(text)
    except json.JSONDecodeError as error:
        lines = text.lstrip().startswith("{")
        hint = "; a file with one object per line ends in .jsonl" if lines and "Extra data" in error.msg else ""
        raise DataError(f"{path}, line {error.lineno}: is not JSON: {error.msg}{hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__}; a list of objects is needed")
    return _frame(rows, None, path)


def read_json_lines(path: Path) -> pd.DataFrame:
    """Read a file with one JSON object per line; blank lines are skipped."""
    rows, lines, problems = [], [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(from_json(line))
            lines.append(number)
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}: is not JSON: {error.msg}")
    if problems:
        more = [f"{path}: and {len(problems) - SHOWN} more such lines"] if len(problems) > SHOWN else []
        raise DataError(problems[:SHOWN] + more)
    return _frame(rows, lines, path)


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file. Needs pyarrow."""
    import pandas as pd

    if not path.is_file():
        raise DataError(f"{path}: no such file; {whats_there(path)}")
    try:
        from pyarrow import parquet

        table = parquet.ParquetFile(path).read()
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'vlmtune[datasets]'") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no Parquet file: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    columns = {name: cells for name, cells in values(table).items() if not name.startswith("__index_level_")}
    frame = pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in columns.items()})
    frame.attrs["file"] = str(path)
    return frame


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
        raise DataError(f"{path}: {error.strerror}; a file is needed here") from None
    if not content.strip():
        raise DataError(f"{path}: is empty; rows are needed")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataError(f"{path}, line {line}: holds NUL bytes (UTF-16, or a spreadsheet); save it as text in UTF-8")
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


READERS = {".csv": read_csv, ".json": read_json, ".jsonl": read_json_lines, ".parquet": read_parquet}
"""By the ending of a file's name."""
