"""Rows on which runs differ, with their images: few enough for a page, and some for every pair of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, zip_longest
from typing import Any

import numpy as np

from vlmtune.comparison.ranking import Comparison, Entry
from vlmtune.comparison.rows import Key, Rows, references
from vlmtune.comparison.texts import label
from vlmtune.metrics.statistics import Floats
from vlmtune.record import pages
from vlmtune.record.outputs import ANSWER

MOST_RUNS, MOST_ROWS, MOST_LETTERS = 40, 80, 400
"""Of the best runs, of rows, and of a text on the page."""


def differing(found: Comparison) -> dict[str, Any]:
    """What the page's script shows for two chosen runs.

    `runs`: name, label and entry of each. `rows`: the chosen rows, with each run's answer (its number in `answers`) and
    score. `images`: their pictures. `counts`: for each two runs, on how many rows of all their scores differ.
    """
    read = [(entry, rows) for entry in found.entries for rows in entry.rows][:MOST_RUNS]
    scores = _scores(found, [rows for _, rows in read])
    with np.errstate(invalid="ignore"):
        counts = [[int(np.sum(np.abs(own - other) > 0)) for other in scores.T] for own in scores.T]
    places = sorted(_chosen(scores))
    images: dict[str, int] = {}
    rows = [_row(found.rows[place], [rows for _, rows in read], scores[place], images) for place in places]
    runs = [{"name": rows.run.name, "label": _label(entry, rows, found), "of": entry.name} for entry, rows in read]
    return {"runs": runs, "rows": rows, "images": list(images), "counts": counts, "all": len(found.rows)}


def _label(entry: Entry, rows: Rows, found: Comparison) -> str:
    """A run of several seeds has its own number beside its entry's."""
    text = label(entry, found)
    return text if len(entry.runs) == 1 else f"{rows.run.name} of {text}"


def _scores(found: Comparison, read: Sequence[Rows]) -> Floats:
    """Scores `[rows, runs]` on the metric that ranks; NaN where a run did not evaluate a row."""
    metric = found.metrics[0]
    answers = references([read], metric)
    values = np.full((len(found.rows), len(read)), np.nan)
    at = {key: number for number, key in enumerate(found.rows)}
    for column, rows in enumerate(read):
        values[[at[key] for key in rows.keys], column] = rows.scores(metric, answers)
    return values


def _chosen(scores: Floats) -> set[int]:
    """Places of rows: in turn one for each pair of runs, those with the best run first."""
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(scores.shape[1]), 2))[: 4 * MOST_ROWS]

    def spread(pair: tuple[int, int]) -> Iterator[int]:
        with np.errstate(invalid="ignore"):
            apart = np.flatnonzero(np.abs(scores[:, pair[0]] - scores[:, pair[1]]) > 0)
        return iter(rng.permutation(apart)[:MOST_ROWS].tolist())  # neighbours often show the same image

    chosen: set[int] = set()
    for turn in zip_longest(*map(spread, pairs)):
        for place in turn:
            if place is not None and len(chosen) < MOST_ROWS:
                chosen.add(place)
    return chosen


def _row(key: Key, read: Sequence[Rows], scores: Any, images: dict[str, int]) -> dict[str, Any]:
    answers: dict[str, int] = {}
    given = [rows.cells[rows.place[key]][ANSWER] if key in rows.place else None for rows in read]
    own = next(rows for rows in read if key in rows.place)
    place = own.place[key]
    record, image = own.records[place], own.image(place)
    return {
        "question": _cut(record.question),
        "reference": _cut(" | ".join(record.answers)),
        "image": None if image is None else images.setdefault(pages.data_uri(image), len(images)),
        "given": [None if text is None else answers.setdefault(_cut(text), len(answers)) for text in given],
        "answers": list(answers),
        "scores": [None if np.isnan(score) else round(float(score), 4) for score in scores],
    }


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
