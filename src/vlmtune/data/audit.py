"""Turns the rows of a frame into records, or bad rows with reasons. Nothing is repaired, replaced or guessed.

The part of a reason before its first colon or number is its category.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune import display
from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.cells import column_values
from vlmtune.data.columns import column_problems, columns_with_text, filled, log_unread, sample_of
from vlmtune.data.images import Source, content_key, image_size, open_image
from vlmtune.data.reader import RowReader
from vlmtune.data.records import Record
from vlmtune.data.rows import row_places
from vlmtune.data.splits import RecordList, Split
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MANY = 2000
"""From this many images on, checking them shows a progress bar."""


def audit_frame(
    frame: pd.DataFrame, config: DataConfig, task: TaskConfig, file: str = "", answers_required: bool = True
) -> Split:
    """Turn a frame's rows into records; rows that can't be used are kept separately, with their reasons.

    An image cell holds a path, a PIL image, bytes, a function that returns a PIL image, a list of these, or nothing (a
    text-only row). `<image>` in a question is the placeholder for an image. Relative paths start from
    `data.image_root`, else from the folder of the row's file: `file`, if the frame's index names none. `Record.row` is
    the position in `frame`. Without `answers_required`, as in prediction, answers may be missing.

    Raises DataError if a column is missing; bad rows raise nothing.
    """
    texts = columns_with_text(sample_of(frame))
    if problems := column_problems(frame.columns, config.columns, file, answers_required, task, texts):
        raise DataError(problems)
    present, at = filled(frame), list(row_places(frame, file))
    files = dict.fromkeys([place.file for place in at] or [file])
    readers = {name: RowReader(config, task, name, answers_required, present) for name in files}
    reader = next(iter(readers.values()))
    log_unread(file, present, config, reader.refusable)
    columns = [_cells(frame, name) for name in reader.columns]
    records, faults = [], []
    for row, (place, *cells) in enumerate(zip(at, *columns, strict=True)):
        record, found = readers[place.file].read(row, cells)
        of_file = place.line or place.row != row + 1
        records.append(dataclasses.replace(record, line=place.line, number=place.row) if of_file else record)
        faults.append([place.fault] if place.fault else found)
    _add_image_faults(records, faults, config)
    good = _group_by_content([record for record, found in zip(records, faults, strict=True) if not found])
    for each in readers.values():
        each.log()
    reader.warn_of_no_images(good, frame.columns)
    bad = [record.refused("; ".join(found)) for record, found in zip(records, faults, strict=True) if found]
    return Split(RecordList(good), frame, bad, repeats_of(good) if answers_required else [])


def _cells(frame: pd.DataFrame, name: str) -> list[Any]:
    places = [place for place, other in enumerate(frame.columns) if str(other) == name]
    return column_values(frame.iloc[:, places[0]]) if places else [None] * len(frame)


# ---------------------------------------------------------------- images and repeats


def _add_image_faults(records: list[Record], faults: list[list[str]], config: DataConfig) -> None:
    """Open each distinct image once, in threads, and add its fault to every row that shows it."""
    distinct = {key: source for record in records for key, source in zip(keys_of(record), record.images, strict=True)}
    check = open_image if config.check_images == "decode" else image_size

    def fault(source: Source) -> str | None:
        try:
            check(source, config.max_image_pixels)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = _with_progress(pool.map(fault, distinct.values()), len(distinct))
        fault_of = dict(zip(distinct, results, strict=True))
    for record, found in zip(records, faults, strict=True):
        found += dict.fromkeys(reason for key in keys_of(record) if (reason := fault_of[key]))


def _group_by_content(records: list[Record]) -> list[Record]:
    """Give rows the same group if their image files are identical; files of different sizes are not read."""
    files: dict[Hashable, Any] = {
        key: source for r in records for key, source in zip(keys_of(r), r.images, strict=True)
    }
    by_size: dict[int, list[Hashable]] = {}
    for key, source in files.items():
        if isinstance(source, Path):
            by_size.setdefault(source.stat().st_size, []).append(key)
    alike = [key for keys in by_size.values() if len(keys) > 1 for key in keys]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = list(pool.map(content_key, [files[key] for key in alike]))
    first: dict[str, Hashable] = {}
    same = {key: first.setdefault(content, key) for key, content in zip(alike, contents, strict=True)}
    if len(set(same.values())) == len(same):
        return records

    def grouped(record: Record) -> Record:
        keys = tuple(same.get(key, key) for key in keys_of(record))
        return dataclasses.replace(record, group=keys if len(keys) > 1 else keys[0]) if keys else record

    return [grouped(record) for record in records]


def keys_of(record: Record) -> tuple[Hashable, ...]:
    """The keys of a record's images, which make up its group."""
    return record.group if isinstance(record.group, tuple) else (record.group,) * len(record.images)


def _with_progress(results: Iterable[str | None], total: int) -> Iterator[str | None]:
    with display.bar("checking images", total, show=total >= MANY) as advance:
        for result in results:
            yield result
            advance()


def repeats_of(records: Iterable[Record]) -> list[tuple[int, int]]:
    """Positions of records that repeat an earlier one (same images and texts), each with the earlier position."""
    first: dict[Hashable, int] = {}
    numbered = enumerate((record.group, record.turns, record.system) for record in records)
    return [(at, original) for at, said in numbered if (original := first.setdefault(said, at)) != at]
