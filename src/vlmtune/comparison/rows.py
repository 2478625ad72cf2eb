"""The evaluated rows of runs: that they are the same, which of them show one image, and each run's answers and scores.

Rows are known by their texts and their image's name, not by their place: the folder of images may have moved, and seeds
may hold out different images.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from vlmtune.comparison.runs import Run
from vlmtune.config import saved
from vlmtune.config.paths import files_of
from vlmtune.config.schema import READ_FILES, Config
from vlmtune.config.strict import strict
from vlmtune.data import table
from vlmtune.data.images import open_image
from vlmtune.data.reader import RowReader
from vlmtune.data.records import Record
from vlmtune.data.table import image_root_of
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.metrics import METRICS, row_scores
from vlmtune.metrics.statistics import Floats
from vlmtune.record.outputs import ANSWER, SCORE, score_columns

log = logging.getLogger("vlmtune")
Key = tuple[str, str, str, int]
References = dict[Key, tuple[str, ...]]


@dataclass
class Rows:
    """The evaluated rows of one run, in the order of its predictions.csv."""

    run: Run
    cells: list[dict[str, str]]
    keys: list[Key]

    @cached_property
    def place(self) -> dict[Key, int]:
        return {key: number for number, key in enumerate(self.keys)}

    @cached_property
    def config(self) -> Config:
        return strict(OmegaConf.create(self.run.config))

    @cached_property
    def records(self) -> list[Record]:
        """The rows as the run read them, their images located."""
        config, present = self.config, list(self.cells[0])
        data = dataclasses.replace(config.data, image_root=image_root_of(config.data, "validation"))
        reader = RowReader(data, config.task, next(iter(self._tables()), ""), answers_required=True, present=present)
        return [reader.read_cells(number, cells)[0] for number, cells in enumerate(self.cells)]

    def _tables(self) -> list[str]:
        """The files that the rows came from; none for other sources."""
        from vlmtune.data.sources.files import parted

        data = self.config.data
        names = files_of(data.validation) or files_of(data.train)
        return [str(parted(name)[0]) for name in names] if data._target_ == READ_FILES else []

    def image(self, place: int) -> Any:
        """The row's first image, opened; None if it has none, or if it is gone."""
        own = next(iter(self.records[place].images), None)
        one_folder = len({Path(name).parent for name in self._tables()}) < 2  # else the row's own table is not known
        if not (one_folder and isinstance(own, Path) and own.is_file()):
            own = next(iter(self.loaded[place].images), None) if self.loaded else None
        try:
            return None if own is None else open_image(own, self.config.data.max_image_pixels)
        except DataError:
            return None

    @cached_property
    def loaded(self) -> Sequence[Record]:
        """The rows from their source; none if it is gone or has changed, or would run code that is not ours."""
        config, path = self.config, self.run.folder / "config.yaml"
        try:
            saved.refuse_code(saved.read(path), path, ())
            data = dataclasses.replace(config.data, check_images="header")
            found = table.load(data, config.task, config.trainer.seed, ("validation",))["validation"].records
        except VlmtuneError as error:
            log.warning("%s: its images are not shown: %s", self.run.folder, error)
            return []
        return found if len(found) == len(self.cells) else []

    def images(self) -> list[Hashable]:
        """Equal for rows that show the same image; a row whose image is not known stands for itself."""
        column = _columns(self.run)[0]
        cells = [row.get(column) or "" for row in self.cells]
        return [key if unknown(cell) else cell for key, cell in zip(self.keys, cells, strict=True)]

    def scores(self, metric: str, references: References) -> list[float]:
        """The rows' scores: those of the file, or another metric's of the same answers. Raises DataError."""
        if column := self.column(metric):
            return [self._score(row, column, number) for number, row in enumerate(self.cells, start=1)]
        answers = [references[key] for key in self.keys]
        return row_scores(METRICS[metric], [row[ANSWER] for row in self.cells], answers)

    def column(self, metric: str) -> str | None:
        """The column of the file that has the metric's scores."""
        columns = dict(zip(self.run.metrics, score_columns(self.run.metrics), strict=True))
        return column if (column := columns.get(metric)) in self.cells[0] else None

    def _score(self, row: dict[str, str], column: str, number: int) -> float:
        try:
            return float(row[column])
        except (ValueError, TypeError):
            path = self.run.folder / "predictions.csv"
            raise DataError(f"{path}: row {number} has no score; evaluate the run again") from None


def unknown(cell: str) -> bool:
    """Whether an image cell does not say which image it is: none, or one that a function made."""
    return not cell.strip() or (cell.startswith("<") and not cell.startswith("<image "))


def read(run: Run) -> Rows:
    """The rows in a run's predictions.csv. Raises DataError where it can't be used."""
    path = run.folder / "predictions.csv"
    csv.field_size_limit(2**31 - 1)  # a document's answer may be longer than 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells: list[dict[str, str]] = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: can't be read: {error}") from error
    if not cells or not {ANSWER, SCORE} <= cells[0].keys():
        raise DataError(f"{path}: has no rows with {ANSWER} and {SCORE}; evaluate the run again")
    image, *texts = _columns(run)
    seen: Counter[tuple[str, ...]] = Counter()
    keys: list[Key] = []
    for row in cells:
        cell, (question, answer) = row.get(image) or "", (row.get(text) or "" for text in texts)
        texts_of = ("" if unknown(cell) else Path(cell).name, question, answer)
        keys.append((*texts_of, seen[texts_of]))
        seen[texts_of] += 1
    return Rows(run, cells, keys)


def _columns(run: Run) -> tuple[str, str, str]:
    """The names of the columns with image, question and answer; of a conversation's, the last two are the same."""
    columns: dict[str, Any] = (run.config.get("data") or {}).get("columns") or {}
    if conversation := columns.get("conversation"):
        return columns.get("image") or "image_path", conversation, conversation
    return tuple(columns.get(role) or name for role, name in ROLES)  # type: ignore[return-value]


ROLES = (("image", "image_path"), ("question", "question"), ("answer", "answer"))


def of_group(group: Sequence[Rows]) -> dict[Key, None]:
    """The rows that a group of seeds evaluated, in order."""
    return dict.fromkeys(key for rows in group for key in rows.keys)


def check_same(groups: Sequence[Sequence[Rows]]) -> None:
    """Raise DataError, naming what differs, unless all groups evaluated the same rows."""
    first = of_group(groups[0])
    for group in groups[1:]:
        other = of_group(group)
        if other.keys() == first.keys():
            continue
        ours, theirs = groups[0][0].run.folder, group[0].run.folder
        only = next((key for key in other if key not in first), None)
        here, there = (theirs, ours) if only else (ours, theirs)
        image, question, answer, _ = only or next(key for key in first if key not in other)
        row = ", ".join(repr(text[:60]) for text in (image, question, answer) if text)
        raise DataError(
            f"{ours} and {theirs}: were not evaluated on the same rows ({len(first)} and {len(other)}): only {here} "
            f"has the row {row}, not {there}; compare runs with the same validation rows (data.validation, "
            "data.max_eval_rows)"
        )


def references(groups: Sequence[Sequence[Rows]], metric: str) -> References:
    """The right answers of all rows, as the first group read them; none if no run needs them for this metric."""
    if all(rows.column(metric) for group in groups for rows in group):
        return {}
    return {key: record.answers for rows in groups[0] for key, record in zip(rows.keys, rows.records, strict=True)}


def matrix(groups: Sequence[Sequence[Rows]], metric: str, keys: Sequence[Key], answers: References) -> Floats:
    """Scores `[rows, groups]`, each the mean over the group's seeds that evaluated the row."""
    at = {key: number for number, key in enumerate(keys)}
    found = np.zeros((len(keys), len(groups)))
    for column, group in enumerate(groups):
        seeds = np.zeros(len(keys))
        for rows in group:
            places = [at[key] for key in rows.keys]
            found[places, column] += rows.scores(metric, answers)
            seeds[places] += 1
        found[:, column] /= seeds
    return found
