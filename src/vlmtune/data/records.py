"""What every data source becomes: records. The rest of the program knows nothing of files or columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its reference answers; the first answer is the one trained on. A prompt alone has no answers."""

    question: str
    answers: tuple[str, ...] = ()
    image_at: tuple[int, ...] = ()
    """Characters of the question in front of which the record's next images stand, in order."""
    trained: bool = True
    """Whether its answer is trained on, where all answers of a conversation are."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row: images and turns about them. Images that no turn places stand in front of the first question."""

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes | Image.Image | Callable[[], Image.Image], ...] = ()
    group: Hashable = None
    """Equal for rows that show the same images; None: shares with no other row."""
    file: str = ""
    row: int = 0
    """Position in its split's frame, from 0."""
    system: str | None = None
    """The conversation's own system prompt, in place of `model.system_prompt`."""
    line: int = field(default=0, compare=False)
    """Line of its file on which it begins, from 1; 0: it is of no file with lines."""
    number: int = field(default=0, compare=False)
    """Number in its own file, from 1; 0: `row` says it."""

    @property
    def question(self) -> str:
        return self.turns[-1].question

    @property
    def answers(self) -> tuple[str, ...]:
        return self.turns[-1].answers

    @property
    def place(self) -> str:
        """Where a person finds this row."""
        line = f"line {self.line}, " if self.line else ""
        return f"{self.file or 'data'}, {line}row {self.number or self.row + 1}"

    def refused(self, reason: str) -> BadRow:
        """This row as one that can't be used."""
        return BadRow(self.file, self.line, self.number or self.row + 1, reason, self.row)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used, and why."""

    file: str
    line: int
    """Line of the file on which the row begins, from 1; the header is line 1. 0: the row is of no file."""
    row: int
    """Number of the row in its file, from 1, the header not counted."""
    reason: str
    position: int | None = field(default=None, compare=False)
    """Position in its split's frame, from 0; None: `row` - 1, where the frame is one file."""

    @property
    def index(self) -> int:
        """Position in the frame."""
        return self.row - 1 if self.position is None else self.position

    @property
    def place(self) -> str:
        """Where a person finds this row in its file."""
        return f"{f'line {self.line}, ' if self.line else ''}row {self.row}"
