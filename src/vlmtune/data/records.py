"""Every data source is turned into records. The rest of the program doesn't know about files or columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its reference answers; the first answer is trained on. In a prediction there may be no answers."""

    question: str
    answers: tuple[str, ...] = ()
    image_at: tuple[int, ...] = ()
    """Character positions in the question of the record's next images, in order."""
    trained: bool = True
    """Whether its answer is trained on, if all answers of a conversation are (data.supervise=all)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row: images and turns about them. Images without a position come before the first question."""

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes | Image.Image | Callable[[], Image.Image], ...] = ()
    group: Hashable = None
    """Equal for rows that show the same images; None: shared with no other row."""
    file: str = ""
    row: int = 0
    """Position in its split's frame, from 0."""
    system: str | None = None
    """The conversation's own system prompt, which replaces `model.system_prompt`."""
    line: int = field(default=0, compare=False)
    """Line of the file on which it begins, from 1; 0: not from a file with lines."""
    number: int = field(default=0, compare=False)
    """Row number in its own file, from 1; 0: same as `row` + 1."""

    @property
    def question(self) -> str:
        return self.turns[-1].question

    @property
    def answers(self) -> tuple[str, ...]:
        return self.turns[-1].answers

    @property
    def place(self) -> str:
        """Where to find this row, for messages."""
        line = f"line {self.line}, " if self.line else ""
        return f"{self.file or 'data'}, {line}row {self.number or self.row + 1}"

    def refused(self, reason: str) -> BadRow:
        """This row as a bad row."""
        return BadRow(self.file, self.line, self.number or self.row + 1, reason, self.row)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used, and why."""

    file: str
    line: int
    """Line of the file on which the row begins, from 1; the header is line 1. 0: not from a file with lines."""
    row: int
    """Number of the row in its file, from 1, not counting the header."""
    reason: str
    position: int | None = field(default=None, compare=False)
    """Position in its split's frame, from 0; None: `row` - 1, if the frame is one file."""

    @property
    def index(self) -> int:
        """Position in the frame."""
        return self.row - 1 if self.position is None else self.position

    @property
    def place(self) -> str:
        """Where to find this row in its file, for messages."""
        return f"{f'line {self.line}, ' if self.line else ''}row {self.row}"
