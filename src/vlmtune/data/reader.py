"""Cells of a row -> a record and its faults. Nothing is repaired, replaced or guessed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.answers import ListAnswers, answers_of
from vlmtune.data.cells import text_of
from vlmtune.data.columns import names_of, refusable
from vlmtune.data.conversations import parse
from vlmtune.data.images import Source
from vlmtune.data.located import Locator
from vlmtune.data.marks import PLACE, media_mark, placed
from vlmtune.data.meanings import AUDIO, COLUMNS, VIDEO, UnreadKeys, meaning_of, refusal
from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")


class RowReader:
    """Turns rows into records and collects the faults in their cells; images are located, not opened.

    `present`: all columns of the table. `columns`: the columns that are read from each row, in this order.
    """

    def __init__(
        self, config: DataConfig, task: TaskConfig, file: str, answers_required: bool, present: Iterable[Any] = ()
    ):
        self.task, self.file, self.answers_required = task, file, answers_required
        self.config = config
        self.names = names_of(config.columns)
        self.unread = UnreadKeys(config.ignore, answers_required)
        self.refusable = refusable(present, config, self.unread)
        """Columns in which a row must not have a value, because it would change the row's meaning."""
        self.unread.media = any(meaning_of(name, COLUMNS) in (VIDEO, AUDIO) for name in self.refusable)
        self.columns = [*self.names.values(), config.columns.system or "", *self.refusable]
        self.lists = ListAnswers(config.answer_lists)
        self.images = Locator(config, file, self.unread)

    def read_cells(self, row: int, cells: Mapping[str, Any]) -> tuple[Record, list[str]]:
        """Read a row given as columns and cells."""
        return self.read(row, [cells.get(name) for name in self.columns])

    def read(self, row: int, cells: Sequence[Any]) -> tuple[Record, list[str]]:
        """Read a row given as the cells of `columns`."""
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

    def log(self) -> None:
        """Log which keys were not read, and how lists were read."""
        self.unread.log(self.file or "data")
        self.lists.log(self.file or "data")

    def warn_of_no_images(self, records: Sequence[Record], present: Iterable[Any]) -> None:
        """Warn if there is no image column and none of the usable `records` has an image."""
        name, done = self.names["image"], "trained" if self.answers_required else "answered"
        if name not in map(str, present) and len(records) and not any(record.images for record in records):
            none = f"none of the {len(records)} usable rows has an image"
            log.warning("%s: no column %r, and %s: %s on text only", self.file or "data", name, none, done)

    def _refusals(self, cells: Sequence[Any]) -> list[str]:
        """Why values in unused columns make this a bad row."""
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
                faults.append(f"placeholders and images differ: {len(places)} x {PLACE} for {len(images)} images")
            if mark := media_mark(text, self.unread.media):
                faults.append(mark)
            self.unread.note_marks(text)
            if not images and not text.strip():
                faults.append("nothing to answer: the row has neither image nor question")
        except DataError as error:
            faults += error.problems
        try:
            answers = self._answers(answer)
        except DataError as error:
            faults += error.problems
        turn = Turn(text if text.strip() else self.task.caption_prompt, answers, places if text.strip() else ())
        return self._record((turn,), images, row, system), faults

    def _answers(self, cell: Any) -> tuple[str, ...]:
        """The references of a row; a prediction needs none. Raises DataError for invalid ones."""
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
            raise DataError(f"placeholders and images differ: {open_places} x {PLACE} for {len(images)} images")
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
        """Why no answer of a conversation is trained on, by the weights of its messages."""
        if not any(turn.trained for turn in turns):
            return "no answer to train on: each has weight 0"
        if self.config.supervise == "last" and not turns[-1].trained:
            return "the last answer has weight 0: data.supervise=all trains on the others"
        return None

    def _record(self, turns: tuple[Turn, ...], images: list[Any], row: int, system: str | None = None) -> Record:
        keys = tuple(key for _, key in images)
        group = None if not keys else keys[0] if len(keys) == 1 else keys
        return Record(turns, tuple(source for source, _ in images), group, self.file, row, system)
