"""Which columns are read, missing, or unused."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.cells import column_values, says_nothing
from vlmtune.data.meanings import COLUMNS, UnreadKeys

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("vlmtune")
SAMPLE = 50
"""Number of rows that are checked to see whether a column has text."""

USUAL = {
    "image": (
        "image",
        "images",
        "image_path",
        "image_paths",
        "img",
        "img_path",
        "imgname",
        "file_name",
        "filename",
        "image_name",
        "image_local_name",
        "image_id",
        "imageid",
    ),
    "question": ("question", "questions", "query", "prompt", "instruction", "problem", "text_input", "user", "input"),
    "answer": (
        "answer",
        "answers",
        "label",
        "response",
        "output",
        "completion",
        "caption",
        "target",
        "text",
        "solution",
    ),
    "conversation": ("conversations", "messages", "conversation", "dialog", "dialogue", "chat", "texts"),
}
"""Usual column names in data sets, the most common first."""
ID = re.compile(r"_?ids?$", re.IGNORECASE).search
NO_IMAGE = re.compile(r"(url|width|height|size|class|classes|type|count|index|caption)s?$", re.IGNORECASE).search
"""Column names that mean something else, however similar they are."""
SURE = 0.85
"""How similar a column's name must be to count as a typo."""
BLANK = {"image": "text-only rows"}
"""Columns that may be empty, and what such rows mean."""


def roles_of(columns: ColumnsConfig) -> tuple[str, ...]:
    """The roles of the columns that are read."""
    if columns.conversation:
        return ("image", "conversation")
    return ("image", "question", "answer") if columns.question is not None else ("image", "answer")


def names_of(columns: ColumnsConfig) -> dict[str, str]:
    """The column for each role."""
    return {role: str(getattr(columns, role)) for role in roles_of(columns)}


def column_problems(
    present: Iterable[Any],
    columns: ColumnsConfig,
    file: str,
    answers_required: bool,
    task: TaskConfig | None = None,
    texts: Sequence[str] = (),
) -> list[str]:
    """Which columns are missing, and the override that would name them.

    A table without a question column is only a set of captions if `task` or a column name of null says so. `texts`:
    the columns with texts. Without a `task`, a missing question column is only reported if other columns are missing.
    """
    names = [str(name) for name in present]
    wanted = names_of(columns)
    taken = set(wanted.values())
    found = [
        f"{file or 'data'}: {names.count(name)} columns are named {name!r}; rename all but one"
        for name in wanted.values()
        if names.count(name) > 1
    ]
    free = [name for name in names if name not in taken]
    for role, name in wanted.items():
        close = _closest(role, name, free, carried="conversation" in wanted)
        optional = {
            "image": "conversation" in wanted and not close,  # messages may contain images, or be text-only
            "question": task is None or (task.name == "caption" and name == "question" and not close),
            "answer": not answers_required,
            "conversation": False,
        }[role]
        if name not in names and not optional:
            found.append(f"{file or 'data'}: no column {name!r}; {_way_out(role, close, names, free, texts)}")
    if found and task is None and "question" in wanted and wanted["question"] not in names:  # all problems in one error
        close = _closest("question", wanted["question"], free)
        found += [f"{file or 'data'}: no column {wanted['question']!r}; {_question_hint(close, free)}"] * bool(close)
    return found


def _way_out(role: str, close: str | None, names: list[str], free: list[str], texts: Sequence[str]) -> str:
    key = f"data.columns.{role}"
    if role == "question":
        return _question_hint(close, [name for name in texts if name in free])
    if role == "conversation" and {"prompt", "completion"} <= set(names):
        return "prompt and completion (TRL's format) are two halves of a conversation; join their lists in one column"
    hint = f"try {override(key, close)}" if close else f"set {key} to one of: {', '.join(names)}"
    if role == "answer" and (chats := [c for c in ("conversations", "messages") if c in names]):
        hint = f"for conversations use data={chats[0]}, or set data.columns.conversation={chats[0]}"
    return hint + "".join(f"; for {rows} add it with empty cells" for part, rows in BLANK.items() if part == role)


def _question_hint(close: str | None, texts: list[str]) -> str:
    unread = f"unused columns with texts: {', '.join(texts)}; " if texts else ""
    named = f"try {override('data.columns.question', close)}" if close else "name it with data.columns.question=..."
    captions = "for captions, rows without a question, set task=caption or data.columns.question=null"
    return f"{unread}{named}; {captions}"


def _closest(role: str, name: str, names: list[str], *, carried: bool = False) -> str | None:
    """The column that is most likely meant: one with a similar name, else the first with a usual name. If messages may
    contain the images (`carried`), the less usual names are not considered, since they often mean something else.
    """
    folded = {other.casefold(): other for other in reversed(names) if not (NO_IMAGE if role == "image" else ID)(other)}
    usual = USUAL[role][:5] if carried and role == "image" else USUAL[role]
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=SURE)
    found += [other for other in usual if other in folded]
    found += difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def override(key: str, value: str) -> str:
    """A key as an override for the command line, quoted if needed."""
    return f"{key}={value}" if value.isidentifier() else f"\"{key}='{value}'\""


# ---------------------------------------------------------------- unused columns


def columns_with_text(sample: Mapping[str, Sequence[Any]]) -> list[str]:
    """The columns with words in some of the first rows."""
    return [
        str(name)
        for name, cells in sample.items()
        if any(isinstance(cell, str) and any(map(str.isalpha, cell)) for cell in cells)
    ]


def sample_of(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """The first cells of each column of a frame."""
    head = frame.head(SAMPLE)
    return {str(name): column_values(head.iloc[:, place]) for place, name in enumerate(head.columns)}


def refusable(present: Iterable[Any], config: DataConfig, unread: UnreadKeys) -> list[str]:
    """Unused columns whose values would change the meaning of a row."""
    read = {*names_of(config.columns).values(), config.columns.system}
    meanings = {str(name): unread.meaning(str(name), COLUMNS) for name in present if str(name) not in read}
    return [name for name, found in meanings.items() if found and found.beside in ("", config.columns.question)]


def log_unread(file: str, present: Iterable[Any], config: DataConfig, refused: Sequence[str]) -> None:
    """Log the unused columns."""
    read = {*names_of(config.columns).values(), config.columns.system, *refused, *config.ignore}
    if names := [str(name) for name in present if str(name) not in read]:
        log.info("%s: columns not read: %s", file or "data", ", ".join(names))


def filled(frame: pd.DataFrame) -> list[str]:
    """The columns of a frame with a value in any row."""
    found = []
    for place, name in enumerate(frame.columns):
        cells = frame.iloc[:, place]
        values = (value for value in column_values(cells.head(SAMPLE)) if not says_nothing(value))
        if next(values, None) is not None or not all(map(says_nothing, column_values(cells))):
            found.append(str(name))
    return found
