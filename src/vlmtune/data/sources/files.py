"""Reads files into frames, with the file and line of each row: CSV, TSV, JSON, JSON lines, Parquet, by extension.

The cells of a CSV are texts, exactly as written; other formats keep their types. Values are never guessed: "NA",
"None", "007" and "1.0" are ordinary answers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.paths import whats_there
from vlmtune.data.rows import FileRows, with_places
from vlmtune.data.sources.arrow import values
from vlmtune.data.sources.csv_files import read_csv
from vlmtune.data.sources.json_files import read_json, read_json_lines
from vlmtune.errors import DataError, to_install

if TYPE_CHECKING:
    import pandas as pd


def parted(name: str) -> tuple[Path, str | None]:
    """A file, and the key in `FILE.json:KEY`."""
    place, colon, key = name.rpartition(":")
    path = Path(name).expanduser()
    if colon and key and Path(place).suffix.lower() == ".json" and not path.exists():
        return Path(place).expanduser(), key
    return path, None


def is_table(name: str) -> bool:
    """Whether `read_table` reads this file, by its extension."""
    return parted(name)[0].suffix.lower() in READERS


def read_table(name: str | Path, header: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a file into a frame with the index file, line, row. `header`: column names of a CSV without a header line.

    A row that can't be read has empty cells; `attrs["unread"]` has its fault (see `rows`). Raises DataError with the
    file and the line of the fault.
    """
    path, key = parted(str(name))
    reader = READERS.get(path.suffix.lower())
    if not path.exists() and "," in str(name) and all(map(is_table, str(name).split(","))):
        raise DataError(f"{name}: is not a file; write several files as a list: [{name}]")
    if reader is None:
        raise DataError(
            f"{path}: has an unknown extension; supported are {', '.join(READERS)}: rename the file by its format"
        )
    options: dict[str, Any] = {"key": key} if key is not None else {}
    if header is not None:
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise DataError(f"{path}: data.header is for CSV and TSV; this file has column names")
        options["header"] = header
    with _nothing_collected():
        found = reader(path, **options)
        return found.frame(path) if isinstance(found, FileRows) else found


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Disable garbage collection: FileRows have no reference cycles, and searching for them takes a third of the time
    of reading a large file.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file. Needs pyarrow."""
    import pandas as pd

    if not path.is_file():
        raise DataError(f"{path}: no such file; {whats_there(path)}")
    try:
        from pyarrow import parquet

        table = parquet.ParquetFile(path).read()
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: {to_install('pyarrow')}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not a Parquet file: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    columns = {name: cells for name, cells in values(table).items() if not name.startswith("__index_level_")}
    return with_places(pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in columns.items()}), path)


READERS: dict[str, Callable[..., FileRows | pd.DataFrame]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
"""The reader for each file extension."""
