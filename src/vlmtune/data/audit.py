"""Rows of a frame become records, or bad rows with their reasons. Nothing is repaired, replaced or guessed.

The part of a reason up to its first colon or number names its kind.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.answers import Lists, answers_of
from vlmtune.data.cells import column_values, text_of
from vlmtune.data.columns import column_problems, columns_with_text, filled, names_of, refusable, sample_of, tell_unread
from vlmtune.data.conversations import PLACE, media_mark, parse, placed
from vlmtune.data.images import Source, content_key, image_size, open_image
from vlmtune.data.located import Locator
from vlmtune.data.meanings import AUDIO, COLUMNS, VIDEO, Unread, meaning_of, refusal
from vlmtune.data.records import Record, Turn
from vlmtune.data.rows import places
from vlmtune.data.splits import RecordList, Split
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
    text-only row). `<image>` in a question says where each image stands. Relative paths start from `data.image_root`,
    else from the folder of the row's file: `file`, where the frame's own index does not name one. `Record.row` is the
    position in `frame`. Without `answers_required`, as in prediction, answers may be missing.

    Raises DataError when a column is missing; bad rows raise nothing.
    """
    texts = columns_with_text(sample_of(frame))
    if problems := column_problems(frame.columns, config.columns, file, answers_required, task, texts):
        raise DataError(problems)
    present, at = filled(frame), list(places(frame, file))
    files = dict.fromkeys([place.file for place in at] or [file])
    readers = {name: Reader(config, task, name, answers_required, present) for name in files}
    reader = next(iter(readers.values()))
    tell_unread(file, present, config, reader.refusable)
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
        each.tell()
    reader.tell_images(good, frame.columns)
    bad = [record.refused("; ".join(found)) for record, found in zip(records, faults, strict=True) if found]
    return Split(RecordList(good), frame, bad, repeats_of(good) if answers_required else [])


def _cells(frame: pd.DataFrame, name: str) -> list[Any]:
    places = [place for place, other in enumerate(frame.columns) if str(other) == name]
    return column_values(frame.iloc[:, places[0]]) if places else [None] * len(frame)


# ---------------------------------------------------------------- rows


class Reader:
    """Rows to records, noting the faults in their cells; images are located, not opened.

    `present`: the columns that there are. `columns`: those whose cells are read of each row, in this order.
    """

    def __init__(
        self, config: DataConfig, task: TaskConfig, file: str, answers_required: bool, present: Iterable[Any] = ()
    ):
        self.task, self.file, self.answers_required = task, file, answers_required
        self.config = config
        self.names = names_of(config.columns)
        self.unread = Unread(config.ignore, answers_required)
        self.refusable = refusable(present, config, self.unread)
        """Columns in which a row must not hold anything that changes its meaning."""
        self.unread.media = any(meaning_of(name, COLUMNS) in (VIDEO, AUDIO) for name in self.refusable)
        self.columns = [*self.names.values(), config.columns.system or "", *self.refusable]
        self.lists = Lists(config.answer_lists)
        self.images = Locator(config, file, self.unread)

    def read_cells(self, row: int, cells: Mapping[str, Any]) -> tuple[Record, list[str]]:
        """A row as columns and cells."""
        return self.read(row, [cells.get(name) for name in self.columns])

    def read(self, row: int, cells: Sequence[Any]) -> tuple[Record, list[str]]:
        """A row as the cells of `columns`."""
        of_role = dict(zip(self.names, cells, strict=False))
        system, *others = cells[len(self.names) :]
        read = self.read_conversation if "conversation" in of_role else self.read_question
        faults = self._refusals(others) if self.refusable else []
        try:
            own = text_of(system, "system prompt")
            record, found = read(row, own if own.strip() else None, **of_role)
        except DataError as error:
            record, found = self._record((Turn(""),), [], row), error.problems
        return record, faults + found

    def tell(self) -> None:
        """Say in the log what was not read, and how lists were."""
        self.unread.tell(self.file or "data")
        self.lists.tell(self.file or "data")

    def tell_images(self, records: Sequence[Record], present: Iterable[Any]) -> None:
        """Warn where there is no image column and none of the usable `records` shows an image."""
        name, done = self.names["image"], "trained" if self.answers_required else "answered"
        if name not in map(str, present) and len(records) and not any(record.images for record in records):
            none = f"none of the {len(records)} usable rows carries an image"
            log.warning("%s: no column %r, and %s: %s on text alone", self.file or "data", name, none, done)

    def _refusals(self, cells: Sequence[Any]) -> list[str]:
        """Why the cells of columns that nothing reads make this a bad row."""
        found = zip(self.refusable, cells, strict=True)
        meant = [(name, value, self.unread.meaning(name, COLUMNS)) for name, value in found]
        return [
            f"column {refusal(name, meaning, value)}"
            for name, value, meaning in meant
            if meaning and meaning.holds(value)
        ]

    def read_question(
        self, row: int, system: str | None, image: Any, answer: Any, question: Any = None
    ) -> tuple[Record, list[str]]:
        images: list[tuple[Source, Hashable]] = []
        answers: tuple[str, ...] = ()
        faults: list[str] = []
        places: tuple[int, ...] = ()
        text = ""
        try:
            text, places = placed(text_of(question, "question"))
            images = self.images.of_cell(image)
            if len(places) not in (0, len(images)):
                faults.append(f"places and images differ: {len(places)} places ({PLACE}) for {len(images)} images")
            if mark := media_mark(text, self.unread.media):
                faults.append(mark)
            self.unread.note_marks(text)
            if not images and not text.strip():
                faults.append("nothing to answer: the row has neither an image nor a question")
        except DataError as error:
            faults += error.problems
        try:
            answers = self._answers(answer)
        except DataError as error:
            faults += error.problems
        turn = Turn(text if text.strip() else self.task.caption_prompt, answers, places if text.strip() else ())
        return self._record((turn,), images, row, system), faults

    def _answers(self, cell: Any) -> tuple[str, ...]:
        """The references of a row; a prediction needs none. Raises DataError for what can't be one."""
        if not self.answers_required:
            return ()
        answers, listed = answers_of(cell, self.config.answer_lists)
        if not answers:
            raise DataError("empty answer")
        if listed:
            self.lists.add(cell, answers[0])
        return answers

    def read_conversation(
        self, row: int, system: str | None, image: Any, conversation: Any
    ) -> tuple[Record, list[str]]:
        found = parse(conversation, answers_required=self.answers_required, unread=self.unread)
        images = self.images.of_cell(image)
        open_places = sum(source is None for source in found.images)
        if open_places != len(images) and (found.images or not images):
            raise DataError(f"places and images differ: {open_places} places ({PLACE}) for {len(images)} images")
        of_row = iter(images)
        placed_images = [next(of_row) if source is None else self.images.locate(source) for source in found.images]
        if system is not None and found.system not in (None, system):
            raise DataError(
                f"two system prompts: column {self.config.columns.system!r} and a message hold different ones"
            )
        if self.answers_required and (problem := self._untrained(found.turns)):
            raise DataError(problem)
        return self._record(
            found.turns, placed_images or images, row, system if found.system is None else found.system
        ), []

    def _untrained(self, turns: Sequence[Turn]) -> str | None:
        """Why a conversation has no answer to train on, by the weights of its messages."""
        if not any(turn.trained for turn in turns):
            return "no answer to train on: each has weight 0"
        if self.config.supervise == "last" and not turns[-1].trained:
            return "the last answer has weight 0: data.supervise=all trains on the others"
        return None

    def _record(self, turns: tuple[Turn, ...], images: list[Any], row: int, system: str | None = None) -> Record:
        keys = tuple(key for _, key in images)
        group = None if not keys else keys[0] if len(keys) == 1 else keys
        return Record(turns, tuple(source for source, _ in images), group, self.file, row, system)


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
