"""An evaluation's metrics by kinds of rows: by the values of a column, or by what a row is like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlmtune import display
from vlmtune.config.schema import Config
from vlmtune.data.cells import as_list, text_of, to_json
from vlmtune.data.images import image_size as size_of
from vlmtune.data.records import Record
from vlmtune.data.splits import Split
from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics import resolve, value_of
from vlmtune.record.runfolder import frame_of

if TYPE_CHECKING:  # it imports torch
    from vlmtune.evaluation.evaluate import Evaluation

Slices = dict[str, dict[str, dict[str, float]]]
"""By column and value: `rows`, how many have this value, and the metrics of these rows."""
MOST = 20
"""Values that are told apart; rarer ones are `other`."""


def answer_length(record: Record, config: Config) -> str:
    words = len(record.answers[0].split())
    return (
        "1 word or less" if words < 2 else "2 or 3 words" if words < 4 else "4 to 10 words" if words < 11 else "longer"
    )


def question_kind(record: Record, config: Config) -> str:
    """The first two words."""
    return " ".join(record.question.lower().split()[:2]) or "none"


def image_size(record: Record, config: Config) -> str:
    """Of the first image, in megapixels as it is stored."""
    if not record.images:
        return "no image"
    width, height = size_of(record.images[0], config.data.max_image_pixels)
    mega = width * height / 1e6
    return "below 0.1" if mega < 0.1 else "0.1 to 0.5" if mega < 0.5 else "0.5 to 2" if mega < 2 else "2 or more"


KINDS: dict[str, Callable[[Record, Config], str]] = {
    "answer_length": answer_length,
    "question_kind": question_kind,
    "image_size": image_size,
}


def check(split: Split, config: Config) -> None:
    """Raise ConfigError for each of `task.slices` that is neither a column of the split nor one of `KINDS`."""
    wanted = [name for name in config.task.slices if name not in KINDS]
    present = [str(name) for name in frame_of(split).columns] if wanted else []
    if problems := [
        f"task.slices: no column {name}; {nearest(name, [*present, *KINDS])}" for name in wanted if name not in present
    ]:
        raise ConfigError(problems)


def sliced(split: Split, found: Evaluation, config: Config) -> Slices:
    """The metrics for each value of each of `task.slices`; every row is in one slice of each."""
    columns = frame_of(split) if any(name not in KINDS for name in config.task.slices) else None
    made: Slices = {}
    for name in config.task.slices:
        if columns is None or (name in KINDS and name not in columns):
            values = [KINDS[name](record, config) for record in split.records]
        else:
            values = [_text(cell) for cell in columns[name]]
        made[name] = _by_value(values, split.records, found, config)
    return made


def _text(cell: Any) -> str:
    cell = as_list(cell)
    if isinstance(cell, list | dict):
        return to_json(cell, str)
    text = "" if cell is None or cell != cell else text_of(cell, "cell")  # NaN differs from itself
    return text.strip() or "(empty)"


def _by_value(
    values: Sequence[str], records: Sequence[Record], found: Evaluation, config: Config
) -> dict[str, dict[str, float]]:
    kept = [value for value, _ in Counter(values).most_common(MOST)]
    places: dict[str, list[int]] = {value: [] for value in kept}
    for place, value in enumerate(values):
        places.setdefault(value if value in kept else "other", []).append(place)
    return {value: _metrics(rows, records, found, config) for value, rows in places.items()}


def _metrics(rows: Sequence[int], records: Sequence[Record], found: Evaluation, config: Config) -> dict[str, float]:
    texts, references = [found.predictions[row] for row in rows], [records[row].answers for row in rows]
    values: dict[str, float] = {"rows": len(rows)}
    for name, metric in resolve(config.task.metrics).items():
        values[name] = value_of(metric, texts, references, [found.scores[row][name] for row in rows])
    return values


def tables(slices: Slices) -> list[str]:
    """One table for each column, its most frequent values first."""
    made = []
    for column, values in slices.items():
        names = list(next(iter(values.values())))
        rows = [(value, *(f"{each[name]:.4g}" for name in names)) for value, each in values.items()]
        made.append(display.table(f"by {column}", (column, *names), rows))
    return made
