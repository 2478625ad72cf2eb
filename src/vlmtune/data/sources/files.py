"""Files as frames, each row knowing its file and line: CSV, TSV, JSON, JSON lines and Parquet, by their ending.

The cells of a CSV are texts, exactly as written; those of the others are what they are. No value is guessed at: "NA",
"None", "007" and "1.0" are answers like others.
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
    """A file, and the key of the list in it that `FILE.json:KEY` names."""
    place, colon, key = name.rpartition(":")
    path = Path(name).expanduser()
    if colon and key and Path(place).suffix.lower() == ".json" and not path.exists():
        return Path(place).expanduser(), key
    return path, None


def is_table(name: str) -> bool:
    """Whether this names a file that `read_table` reads, by its ending."""
    return parted(name)[0].suffix.lower() in READERS


def read_table(name: str | Path, header: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a file into a frame whose index is file, line and row; `header` names the columns of a headless CSV.

    A row that can't be read is there with empty cells; `attrs["unread"]` has its fault (see `rows`).
    Raises DataError that names the file, and the line at fault.
    """
    path, key = parted(str(name))
    reader = READERS.get(path.suffix.lower())
    if not path.exists() and "," in str(name) and all(map(is_table, str(name).split(","))):
        raise DataError(f"{name}: is no file; several files are a list: [{name}]")
    if reader is None:
        raise DataError(
            f"{path}: ends in none of {', '.join(READERS)}, so its form isn't known; rename the file by what it holds"
        )
    options: dict[str, Any] = {"key": key} if key is not None else {}
    if header is not None:
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise DataError(f"{path}: data.header is for CSV and TSV; the columns of this file have names")
        options["header"] = header
    with _nothing_collected():
        found = reader(path, **options)
        return found.frame(path) if isinstance(found, FileRows) else found


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """FileRows have no cycles, and looking for some takes a third of the time in which a large file is read."""
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
"""By the ending of a file's name."""
