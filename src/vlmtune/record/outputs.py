"""The table that predict.py and evaluate.py write: checked before anything is computed, kept when they are ended.

Both write rows in the input's order, as they are answered, to FILE.partial, which becomes FILE when all rows are there.
What ends them before that leaves whole rows in FILE.partial.
"""

from __future__ import annotations

import csv
import fcntl
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data import fingerprint
from vlmtune.data.cells import as_list, text_of, to_json
from vlmtune.errors import ConfigError, DataError, VlmtuneError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("vlmtune")
ANSWER, ERROR, SCORE = "answer_predictions", "error", "score"
FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.,]*\d%?$)")
"""What a spreadsheet takes for a formula; a signed number is none."""


def score_columns(metrics: Sequence[str]) -> list[str]:
    """The columns of rows' scores: `score` for the first metric, `score_NAME` for each other one."""
    return [SCORE if place == 0 else f"{SCORE}_{name}" for place, name in enumerate(metrics)]


# ---------------------------------------------------------------- before anything is computed


def output_file(output: str | None, inputs: Iterable[str], run: Path) -> Path:
    """The file to write to: a new one, or one with former answers, which is replaced.

    Raises ConfigError where it can't be written or would replace anything else: one of `inputs`, a file of the run, a
    table of the user's, a device. A symbolic link stays, and the file that it names is written.
    """
    if not str(output or "").strip():
        raise ConfigError("output: missing; name a CSV file, for instance output=predictions.csv")
    try:
        target = Path(str(output)).expanduser().resolve()
        problem = _problem(target, inputs, run) or _unwritable(target)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a NUL
        problem = str(getattr(error, "strerror", None) or error)
    if problem:
        raise ConfigError(f"output={output}: {problem}")
    return target


def _problem(target: Path, inputs: Iterable[str], run: Path) -> str | None:
    if target.is_dir():
        return "is a folder; name a CSV file in it"
    if not target.parent.is_dir():
        return f"the folder {target.parent} does not exist"
    if target.suffix.lower() != ".csv":
        return f"must end in .csv, for instance {target.name}.csv"
    if not target.exists():
        return None
    if not target.is_file():
        return "is not a regular file; name another"
    if any(Path(name).expanduser().exists() and target.samefile(Path(name).expanduser()) for name in inputs):
        return "is the table that is read; name another file"
    if target.parent == run.expanduser().resolve():
        return "belongs to the run; name a file elsewhere"
    if target.stat().st_size and ANSWER not in _header(target):
        return f"is not a file of earlier answers (no column {ANSWER}); name another file, or delete it"
    return None


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader([file.readline(1_000_000)]), [])


def _unwritable(target: Path) -> str | None:
    """Why the file or the partial file beside it could not be written, found by writing another one there."""
    partial = partial_of(target)
    if target.exists() and not os.access(target, os.W_OK):
        return "is write-protected; name another file"
    if partial.is_dir():
        return f"can't be written: {partial.name} is a folder"
    if in_use(partial):
        return f"another process is writing {partial.name}; wait for it, or name another file"
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=partial.name):
            return None
    except OSError as error:
        return f"can't be written: {error.strerror}"


def partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def in_use(partial: Path) -> bool:
    """Whether a running process writes this file; each holds a lock on its own."""
    if not partial.is_file():
        return False
    with partial.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return False


def open_new(path: Path) -> Any:
    """A new, locked file of this name. Rows that an interrupted call left there are kept under another name."""
    if path.is_symlink() or (path.exists() and not path.stat().st_size):
        path.unlink()
    elif path.exists():
        names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(name))
        path.rename(kept)
        log.warning("%s: holds the rows of an interrupted call; kept as %s", path, kept.name)
    file = path.open("x", encoding="utf-8", newline="")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def refuse_columns(columns: Any, ours: Sequence[str], place: str) -> None:
    """Raise DataError where the input has a column that the output would overwrite, or several of one name."""
    if getattr(columns, "nlevels", 1) > 1:
        raise DataError(f"{place}: its columns have {columns.nlevels} levels; give it names of one level")
    names = list(columns)
    problems = [
        f"{place}: has a column {name!r} already, which the answers would overwrite; rename it, for instance to "
        f"{name}_before"
        for name in ours
        if name in names
    ]
    problems += [f"{place}: has {names.count(name)} columns {name!r}; rename one" for name in repeated(names)]
    if problems:
        raise DataError(problems)


def repeated(names: Sequence[Any]) -> list[Any]:
    """The names that are there more than once."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


# ---------------------------------------------------------------- rows as they come


@dataclass
class Answers:
    """A frame's answers, of which some are still missing."""

    frame: pd.DataFrame
    reasons: dict[int, str] = field(default_factory=dict)
    """Why rows have no answer, by their position in the frame."""
    texts: dict[int, str] = field(default_factory=dict)

    def table(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """A copy of these rows with the column answer_predictions, and `error` if any row of the frame has one."""
        part = self.frame.iloc[start:stop].copy()
        rows = range(start, start + len(part))
        part[ANSWER] = [self.texts.get(row) for row in rows]
        if self.reasons:
            part[ERROR] = [self.reasons.get(row) for row in rows]
        return part


@dataclass
class Scored(Answers):
    """Answers with their scores."""

    columns: Sequence[str] = (SCORE,)
    scores: dict[int, Sequence[float]] = field(default_factory=dict)
    """By row, one for each column."""

    def table(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        part = super().table(start, stop)
        none = [None] * len(self.columns)
        rows = [self.scores.get(row, none) for row in range(start, start + len(part))]
        for place, column in enumerate(self.columns):
            part[column] = [row[place] for row in rows]
        return part


class Rows:
    """Answers on their way into a file."""

    def __init__(self, target: Path, answers: Answers):
        self.target, self.partial, self.answers = target, partial_of(target), answers
        self.written, self.with_reasons = 0, bool(answers.reasons)
        self.file: Any = None

    def write(self, stop: int) -> None:
        """Write all rows before `stop` that are not written yet. Raises VlmtuneError on a full disk."""
        try:
            self._write(stop)
        except OSError as error:
            raise VlmtuneError(
                f"{self.partial}: can't be written ({error.strerror}); it holds the rows before that"
            ) from error

    def _write(self, stop: int) -> None:
        self.file = self.file or open_new(self.partial)
        if self.with_reasons != bool(self.answers.reasons):  # the first row that failed brings a column more
            self.again()
            self.with_reasons = True
        part = as_cells(self.answers.table(self.written, stop))
        self.file.write(part.to_csv(index=False, header=self.written == 0))
        self.file.flush()
        self.written = stop

    def again(self) -> None:
        """Begin the file again: what is written of its rows has changed."""
        if self.file is not None:
            self.file.seek(0)
            self.file.truncate()
        self.written = 0

    def finish(self) -> None:
        """Write the rest, and give the file its name."""
        self.write(len(self.answers.frame))
        try:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            self.partial.replace(self.target)
        except OSError as error:
            raise VlmtuneError(
                f"{self.target}: can't be written ({error.strerror}); all rows are in {self.partial}"
            ) from error

    def close(self) -> None:
        """Leave the partial file of rows that are not complete as it is, and say so."""
        if self.file is not None:
            self.file.close()
            log.warning("%s: holds the first %d of %d rows", self.partial, self.written, len(self.answers.frame))


def as_cells(frame: Any) -> Any:
    """The frame with what a CSV cell can hold: lists and objects as JSON, images in memory by their content's hash."""
    import pandas as pd
    from PIL import Image

    def named(value: Any) -> str:
        if isinstance(value, bytes | Image.Image):
            return f"<image {fingerprint.content(value).hex()}>"
        return value if isinstance(value, str) else f"<{type(value).__name__}>"

    def flat(cell: Any) -> Any:
        cell = as_list(cell)
        if isinstance(cell, bytes | Image.Image):
            return named(cell)
        if isinstance(cell, list | dict):
            return to_json(cell, named)
        return text_of(cell, "cell") if isinstance(cell, bool) else cell

    objects = [name for name in frame.columns if frame[name].dtype == object]
    # Series.map would infer a type, and make floats of integers beside a missing value
    cells = {name: pd.Series([*map(flat, frame[name])], frame.index, dtype=object) for name in objects}
    return frame.assign(**cells)


def warn_of_formulas(path: Path, answers: Iterable[str]) -> None:
    """Say that a spreadsheet would run some of these answers: they are written as they are, so as to be read again."""
    count = sum(FORMULA.match(answer) is not None for answer in answers)
    if count:
        log.warning("%s: %d answers look like formulas to a spreadsheet; import that column as text", path, count)
