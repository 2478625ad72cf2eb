"""The references of an answer cell.

A list of texts means several references; the first one is trained on. Anything else is the answer itself.
`data.answer_lists=text` treats lists of texts as answers too.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from vlmtune.data.cells import Number, as_list, is_blank, json_list, text_of, to_json
from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")
PYTHON_LIST = re.compile(r"\s*\[\s*'.*'\s*\]\s*", re.DOTALL)


def answers_of(cell: Any, lists: str) -> tuple[tuple[str, ...], bool]:
    """The references of an answer cell, and whether they came from a list of texts.

    `lists`: treat such a list as several `references`, or as the answer's `text`, in JSON.
    """
    cell = as_list(cell)
    if isinstance(cell, str) and lists == "references" and PYTHON_LIST.fullmatch(cell):
        raise DataError(f'answer is a Python list: {cell:.60}; write JSON: ["one", "two"]')
    found = list(cell) if isinstance(cell, list | tuple) else json_list(cell) if isinstance(cell, str) else None
    of_texts = bool(found) and all(_is_text(item) for item in found or ())
    if of_texts and lists == "references":
        assert found is not None
        if any(is_blank(item) for item in found):
            raise DataError("empty answer: one in the list is blank")
        return tuple(text_of(item, "answer") for item in found), True
    if lists == "references" and found and (problem := _doubtful(found)):
        raise DataError(f"{problem}; data.answer_lists=text trains on the list itself")
    if isinstance(cell, list | tuple):
        text = to_json(cell) if cell or lists == "text" else ""
    else:
        text = text_of(cell, "answer")
    return ((text,) if text.strip() else ()), of_texts


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and not isinstance(item, Number)


def _doubtful(found: list[Any]) -> str | None:
    """Why a list is probably not meant as the answer itself."""
    if any(item is None for item in found) and any(map(_is_text, found)):
        return f"answer is a list of texts with a null in it: {found!s:.60}"
    if all(isinstance(item, dict) and "answer" in item for item in found):
        return f"answer is a list of objects with an answer each (VQA v2): {found!s:.60}; write a list of their texts"
    return None


class ListAnswers:
    """Counts answers that are lists of texts, to log once how they are read."""

    def __init__(self, reading: str):
        self.reading, self.rows = reading, 0
        self.example: str | None = None

    def add(self, cell: Any, answer: str) -> None:
        """Count an answer that is a list; `answer` is trained on."""
        self.rows += 1
        if self.rows == 1:
            self.example = f"{as_list(cell)!s:.60} as {answer:.60}"

    def log(self, file: str) -> None:
        """Log how lists are read."""
        if self.example is None:
            return
        if self.reading == "references":
            said = "the first text is trained on, all are accepted as correct", "text trains on the whole list"
        else:
            said = "the whole list is trained on as JSON", "references trains on the first text"
        shown = (file, self.rows, said[0], self.example, said[1])
        log.info("%s: answers that are lists of texts: %d; %s (%s); data.answer_lists=%s", *shown)
        self.example = None
