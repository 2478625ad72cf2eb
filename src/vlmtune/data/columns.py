"""Which columns are read, which are missing, and which nothing reads."""

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
"""Rows that are looked at to see whether a column holds text."""

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
"""Names that data sets give to what is read, the usual ones first."""
ID = re.compile(r"_?ids?$", re.IGNORECASE).search
NO_IMAGE = re.compile(r"(url|width|height|size|class|classes|type|count|index|caption)s?$", re.IGNORECASE).search
"""Names of columns that hold something else than what is read, however near their names are."""
SURE = 0.85
"""How near a column's name is to the wanted one where it is a slip of the pen."""
BLANK = {"image": "rows of text alone"}
"""Columns that may be empty, and what such rows are."""


def roles_of(columns: ColumnsConfig) -> tuple[str, ...]:
    """What is read of a row."""
    if columns.conversation:
        return ("image", "conversation")
    return ("image", "question", "answer") if columns.question is not None else ("image", "answer")


def names_of(columns: ColumnsConfig) -> dict[str, str]:
    """The column of each role."""
    return {role: str(getattr(columns, role)) for role in roles_of(columns)}


def column_problems(
    present: Iterable[Any],
    columns: ColumnsConfig,
    file: str,
    answers_required: bool,
    task: TaskConfig | None = None,
    texts: Sequence[str] = (),
) -> list[str]:
    """Say which columns are missing, and the override that would name them.

    A table without its question column is a set of captions only where that is said: by `task`, or by a name of null.
    `texts`: the columns that hold texts. Without a `task`, the question column is only looked for beside others.
    """
    names = [str(name) for name in present]
    wanted = names_of(columns)
    taken = set(wanted.values())
    found = [
        f"{file or 'data'}: {names.count(name)} columns are called {name!r}; rename all but one"
        for name in wanted.values()
        if names.count(name) > 1
    ]
    free = [name for name in names if name not in taken]
    for role, name in wanted.items():
        close = _closest(role, name, free, carried="conversation" in wanted)
        optional = {
            "image": "conversation" in wanted and not close,  # messages may carry images, or be of text alone
            "question": task is None or (task.name == "caption" and name == "question" and not close),
            "answer": not answers_required,
            "conversation": False,
        }[role]
        if name not in names and not optional:
            found.append(f"{file or 'data'}: no column {name!r}; {_way_out(role, close, names, free, texts)}")
    if found and task is None and "question" in wanted and wanted["question"] not in names:  # all in one error
        close = _closest("question", wanted["question"], free)
        found += [f"{file or 'data'}: no column {wanted['question']!r}; {_question_hint(close, free)}"] * bool(close)
    return found


def _way_out(role: str, close: str | None, names: list[str], free: list[str], texts: Sequence[str]) -> str:
    key = f"data.columns.{role}"
    if role == "question":
        return _question_hint(close, [name for name in texts if name in free])
    if role == "conversation" and {"prompt", "completion"} <= set(names):
        return "prompt and completion (TRL's form) are two halves of a conversation; join their lists in one column"
    hint = f"try {override(key, close)}" if close else f"set {key} to one of: {', '.join(names)}"
    if role == "answer" and (chats := [c for c in ("conversations", "messages") if c in names]):
        hint = f"for conversations use data={chats[0]}, or set data.columns.conversation={chats[0]}"
    return hint + "".join(f"; for {rows} add it with empty cells" for part, rows in BLANK.items() if part == role)


def _question_hint(close: str | None, texts: list[str]) -> str:
    unread = f"columns with texts that nothing reads: {', '.join(texts)}; " if texts else ""
    named = f"try {override('data.columns.question', close)}" if close else "name it with data.columns.question=..."
    captions = "for captions, rows without a question, set task=caption or data.columns.question=null"
    return f"{unread}{named}; {captions}"


def _closest(role: str, name: str, names: list[str], *, carried: bool = False) -> str | None:
    """The column that is most likely meant: one of nearly that name, else the first of a usual one. Where images may be
    `carried` by messages, the less usual names are other things as often.
    """
    folded = {other.casefold(): other for other in reversed(names) if not (NO_IMAGE if role == "image" else ID)(other)}
    usual = USUAL[role][:5] if carried and role == "image" else USUAL[role]
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=SURE)
    found += [other for other in usual if other in folded]
    found += difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def override(key: str, value: str) -> str:
    """The command line's form of a key, in quotes where it needs them."""
    return f"{key}={value}" if value.isidentifier() else f"\"{key}='{value}'\""


# ---------------------------------------------------------------- what nothing reads


def columns_with_text(sample: Mapping[str, Sequence[Any]]) -> list[str]:
    """The columns of which some of the first rows hold words."""
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
    """Columns that nothing reads and that change what a row means where they hold something."""
    read = {*names_of(config.columns).values(), config.columns.system}
    meanings = {str(name): unread.meaning(str(name), COLUMNS) for name in present if str(name) not in read}
    return [name for name, found in meanings.items() if found and found.beside in ("", config.columns.question)]


def log_unread(file: str, present: Iterable[Any], config: DataConfig, refused: Sequence[str]) -> None:
    """Name the columns that nothing reads in the log."""
    read = {*names_of(config.columns).values(), config.columns.system, *refused, *config.ignore}
    if names := [str(name) for name in present if str(name) not in read]:
        log.info("%s: columns not read: %s", file or "data", ", ".join(names))


def filled(frame: pd.DataFrame) -> list[str]:
    """The columns of a frame that hold something in any row."""
    found = []
    for place, name in enumerate(frame.columns):
        cells = frame.iloc[:, place]
        values = (value for value in column_values(cells.head(SAMPLE)) if not says_nothing(value))
        if next(values, None) is not None or not all(map(says_nothing, column_values(cells))):
            found.append(str(name))
    return found
