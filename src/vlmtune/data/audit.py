"""Rows of a frame become records, or bad rows with their reasons. Nothing is repaired, replaced or guessed.

The part of a reason up to its first colon or number names its kind.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmtune.config import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.conversations import PLACE, as_list, parse, placed
from vlmtune.data.images import Source, content_key, image_size, open_image
from vlmtune.data.paths import local_path
from vlmtune.data.records import Record, Split, Turn
from vlmtune.data.rows import places
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("vlmtune")
MANY = 2000
"""Images from which on checking them shows a progress bar."""


def audit_frame(
    frame: pd.DataFrame, config: DataConfig, task: TaskConfig, file: str = "", answers_required: bool = True
) -> Split:
    """Turn a frame's rows into records, and keep apart those that can't be used, with their reasons.

    An image cell holds a path, a PIL image, bytes, a function that returns a PIL image, a list of these, or nothing (a
    text-only row). In a row with a list, `<image>` in the question says where each stands. Relative paths start from
    `data.image_root`, else from the folder of the row's file: `file`, where the frame's own index does not name one.
    `Record.row` is the position in `frame`. Without `answers_required`, as in prediction, answers may be missing.

    Raises DataError when a column is missing; bad rows raise nothing.
    """
    if problems := column_problems(frame.columns, config.columns, file, answers_required):
        raise DataError(problems)
    at = list(places(frame, file))
    readers = {name: Reader(config, task, name, answers_required) for name in dict.fromkeys(place.file for place in at)}
    reader = next(iter(readers.values()), Reader(config, task, file, answers_required))
    columns = [_cells(frame, reader.names[role]) for role in reader.roles]
    records, faults = [], []
    for row, (place, *cells) in enumerate(zip(at, *columns, strict=True)):
        record, found = readers[place.file].read(row, *cells)
        of_file = place.line or place.row != row + 1
        records.append(dataclasses.replace(record, line=place.line, number=place.row) if of_file else record)
        faults.append([place.fault] if place.fault else found)
    _add_image_faults(records, faults, config)
    if reader.names["image"] not in frame.columns and not any(record.images for record in records):
        log.warning(
            "%s: no column %r, and no message carries an image: trained on text alone", file, reader.names["image"]
        )
    good = _group_by_content([record for record, found in zip(records, faults, strict=True) if not found])
    bad = [record.refused("; ".join(found)) for record, found in zip(records, faults, strict=True) if found]
    return Split(good, frame, bad, repeats_of(good) if answers_required else [])


# ---------------------------------------------------------------- columns

BLANK = {"image": "rows of text alone", "question": "captions"}
"""Columns that may be empty, and what such rows are."""


def roles_of(columns: ColumnsConfig) -> tuple[str, ...]:
    """What is read of a row."""
    return ("image", "conversation") if columns.conversation else ("image", "question", "answer")


def column_problems(present: Iterable[Any], columns: ColumnsConfig, file: str, answers_required: bool) -> list[str]:
    """Say which columns are missing, and the override that would name them.

    The question column may be absent (every row is then a caption), unless it was named or another one looks like it.
    """
    names = [str(name) for name in present]
    found = []
    for role, name in ((role, str(getattr(columns, role))) for role in roles_of(columns)):
        taken = {str(getattr(columns, other)) for other in roles_of(columns)} - {name}
        close = _closest(name, [other for other in names if other not in taken])
        optional = {
            "image": columns.conversation is not None and not close,  # messages may carry images, or be of text alone
            "question": name == "question" and not close,
            "answer": not answers_required,
            "conversation": False,
        }[role]
        if name not in names and not optional:
            key = f"data.columns.{role}"
            hint = f"try {_override(key, close)}" if close else f"set {key} to one of: {', '.join(names)}"
            if role == "answer" and (chats := [c for c in ("conversations", "messages") if c in names]):
                hint = f"for conversations use data={chats[0]}, or set data.columns.conversation={chats[0]}"
            hint += "".join(f"; for {rows} add it with empty cells" for part, rows in BLANK.items() if part == role)
            found.append(f"{file or 'data'}: no column {name!r}; {hint}")
    return found


def _closest(name: str, names: list[str]) -> str | None:
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[close[0]] if close else None


def _override(key: str, value: str) -> str:
    return f"{key}={value}" if value.isidentifier() else f"\"{key}='{value}'\""


def _cells(frame: pd.DataFrame, name: str) -> list[Any]:
    return frame[name].tolist() if name in frame.columns else [None] * len(frame)


# ---------------------------------------------------------------- cells


class Reader:
    """Rows to records, noting the faults in their cells; images are located, not opened."""

    def __init__(self, config: DataConfig, task: TaskConfig, file: str, answers_required: bool):
        own = Path(file).expanduser()
        self.root = Path(config.image_root).expanduser() if config.image_root else own if own.is_dir() else own.parent
        self.task, self.file, self.answers_required = task, file, answers_required
        self.separator = config.image_separator
        self.names = vars(config.columns)
        self.roles = roles_of(config.columns)
        self.paths: dict[str, Path] = {}

    def read_cells(self, row: int, cells: Mapping[str, Any]) -> tuple[Record, list[str]]:
        """A row as columns and cells."""
        return self.read(row, *(cells.get(self.names[role]) for role in self.roles))

    def read(self, row: int, *cells: Any) -> tuple[Record, list[str]]:
        """A row as the cells of `roles`, in order."""
        return (self.read_conversation if "conversation" in self.roles else self.read_question)(row, *cells)

    def read_question(self, row: int, image: Any, question: Any, answer: Any) -> tuple[Record, list[str]]:
        images: list[tuple[Source, Hashable]] = []
        answers: tuple[str, ...] = ()
        faults: list[str] = []
        places: tuple[int, ...] = ()
        text = ""
        try:
            text = _text(question, "question")
            images, listed = self.locate_all(image)
            if listed:
                text, places = placed(text)
            if len(places) not in (0, len(images)):
                faults.append(f"{len(places)} places ({PLACE}) for {len(images)} images")
            if not images and not text.strip():
                faults.append("nothing to answer: the row has neither an image nor a question")
        except DataError as error:
            faults += error.problems
        try:
            answers = _answers(answer)
            if self.answers_required and not answers:
                faults.append("empty answer")
        except DataError as error:
            faults += error.problems
        turn = Turn(text if text.strip() else self.task.caption_prompt, answers, places if text.strip() else ())
        return self._record((turn,), images, row), faults

    def read_conversation(self, row: int, image: Any, conversation: Any) -> tuple[Record, list[str]]:
        empty = self._record((Turn(""),), [], row)
        try:
            found = parse(conversation, answers_required=self.answers_required)
            images, _ = self.locate_all(image)
            open_places = sum(source is None for source in found.images)
            if open_places != len(images) and (found.images or not images):
                return empty, [f"{open_places} places ({PLACE}) for {len(images)} images"]
            of_row = iter(images)
            placed_images = [next(of_row) if source is None else self.locate(source) for source in found.images]
        except DataError as error:
            return empty, error.problems
        return self._record(found.turns, placed_images or images, row, found.system), []

    def _record(self, turns: tuple[Turn, ...], images: list[Any], row: int, system: str | None = None) -> Record:
        keys = tuple(key for _, key in images)
        group = None if not keys else keys[0] if len(keys) == 1 else keys
        return Record(turns, tuple(source for source, _ in images), group, self.file, row, system)

    def locate_all(self, cell: Any) -> tuple[list[tuple[Source, Hashable]], bool]:
        """The images of a cell, each with its key; and whether the cell is a list."""
        listed = _list(cell, self.separator)
        if listed is not None:
            return [self.locate(item) for item in listed], True
        return ([] if _is_blank(cell) else [self.locate(cell)]), False

    def locate(self, cell: Any) -> tuple[Source, Hashable]:
        """One image and its key: equal for equal images."""
        if isinstance(cell, dict) and {"bytes", "path"} & cell.keys():  # an image as Hugging Face's data sets store it
            path = cell.get("path")
            if not cell.get("bytes") and "://" in str(path):  # in an archive, or on a hub
                return partial(_from_data_set, cell), str(path)
            cell = cell.get("bytes") or path
        if isinstance(cell, str) and cell.startswith("data:image/") and ";base64," in cell[:64]:
            cell = _decoded(cell)
        if isinstance(cell, bytes):
            return cell, hashlib.sha256(cell).hexdigest()
        if isinstance(cell, Image.Image) or callable(cell):
            return cell, id(cell)
        if _is_blank(cell):
            raise DataError("not an image: an image in the list is missing")
        if not isinstance(cell, str | Path):
            raise DataError(f"not an image: the cell is {type(cell).__name__}; give a path, bytes or a PIL image")
        text = str(cell)
        if text not in self.paths:
            self.paths[text] = Path(os.path.realpath(self.root / os.path.expanduser(local_path(text))))
        return self.paths[text], str(self.paths[text])


def _from_data_set(cell: dict[str, Any]) -> Image.Image:
    import datasets

    picture: Image.Image = datasets.Image().decode_example(cell)
    return picture


def _list(cell: Any, separator: str | None) -> list[Any] | None:
    """The items of a cell that holds several images: a list, a JSON list of texts, or texts between separators."""
    cell = as_list(cell)
    if isinstance(cell, list | tuple):
        return list(cell)
    if not isinstance(cell, str):
        return None
    found = _json(cell)
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return found
    if separator is not None and separator in cell:
        return [part.strip() for part in cell.split(separator)]
    return None


def _decoded(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except ValueError as error:
        raise DataError(f"not an image: the data URL is not base64 ({error})") from None


def _is_blank(cell: Any) -> bool:
    return _is_missing(cell) or (isinstance(cell, str) and not cell.strip())


def _text(cell: Any, role: str) -> str:
    """A cell as text. Raises DataError for what is no single value: its Python form is nobody's question or answer."""
    if isinstance(as_list(cell), list | tuple | dict | bytes) or (hasattr(cell, "tolist") and not _is_scalar(cell)):
        raise DataError(f"{role} is {type(cell).__name__}: {cell!s:.60}; a text is needed")
    return "" if _is_missing(cell) else str(cell)


def _is_scalar(cell: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_scalar(cell))


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, str):
        return False
    import pandas as pd

    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def _answers(cell: Any) -> tuple[str, ...]:
    """References of a row: the cell as written, or each text of a JSON list of texts. "[12, 40]" is a text itself."""
    cell = as_list(cell)
    text = "" if isinstance(cell, list | tuple) else _text(cell, "answer")
    if re.fullmatch(r"\s*\['.*'\]\s*", text, re.DOTALL) and isinstance(cell, str):
        raise DataError(f'answer is a Python list: {text:.60}; write JSON: ["one", "two"]')
    texts = list(cell) if isinstance(cell, list | tuple) else _json(text)
    if isinstance(cell, list | tuple) and not all(isinstance(item, str) for item in texts):
        kinds = ", ".join(sorted({type(item).__name__ for item in texts}))
        raise DataError(f"answer is a list of {kinds}: {cell!s:.60}; a list of texts is needed")
    if not (isinstance(texts, list) and texts and all(isinstance(item, str) for item in texts)):
        return (text,) if text.strip() else ()
    if not all(item.strip() for item in texts):
        raise DataError("empty answer: one in the list is blank")
    return tuple(texts)


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return None


# ---------------------------------------------------------------- images and repeats


def _add_image_faults(records: list[Record], faults: list[list[str]], config: DataConfig) -> None:
    """Open each distinct image once, in threads, and note its fault at every row that shows it."""
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
    """Give rows one group where their image files are copies of each other; files of different sizes aren't read."""
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
    """The keys of a record's images, of which its group is made."""
    return record.group if isinstance(record.group, tuple) else (record.group,) * len(record.images)


def _with_progress(results: Iterable[str | None], total: int) -> Iterable[str | None]:
    if total < MANY:
        return results
    from tqdm import tqdm

    progress: Iterable[str | None] = tqdm(results, "checking images", total, leave=False, disable=None)
    return progress


def repeats_of(records: Iterable[Record]) -> list[tuple[int, int]]:
    """Positions of records that say the same of the same images as an earlier one, each with that one's."""
    first: dict[Hashable, int] = {}
    numbered = enumerate((record.group, record.turns, record.system) for record in records)
    return [(at, original) for at, said in numbered if (original := first.setdefault(said, at)) != at]
