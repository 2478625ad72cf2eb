"""What the page asks: JSON that anybody may have written -> a record and how to answer it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.config.schema import GenerationConfig
from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError
from vlmtune.serve.sides import Side
from vlmtune.serve.uploads import Uploads

MOST_BYTES = 2**20
"""Of a request."""
MOST_CHARACTERS = 20_000
"""Of a question."""
MOST_TURNS = 100
MOST_IMAGES = 16
"""Of a conversation."""
MOST_TOKENS = 100_000
"""Of an answer."""


@dataclass(frozen=True)
class Question:
    """A conversation whose last question is to be answered."""

    side: Side
    record: Record
    generation: GenerationConfig
    seed: int


def read(body: bytes, sides: Sequence[Side], uploads: Uploads) -> Question:
    """The question in `body`. Raises DataError for anything but a request as the page sends it.

    `{"side": 0, "temperature": 0, "max_new_tokens": 256, "seed": 0, "turns": [{"question": "...", "images": ["KEY"],
    "answer": "..."}, ...]}`; the last turn has no answer.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError("the request is not JSON") from error
    if not isinstance(asked, dict):
        raise DataError("the request is not a JSON object")
    side = sides[_whole(asked, "side", 0, len(sides) - 1)]
    most = min(side.positions or MOST_TOKENS, MOST_TOKENS)
    generation = dataclasses.replace(
        side.config.generation,
        temperature=_number(asked, "temperature", 0, 10),
        max_new_tokens=_whole(asked, "max_new_tokens", 1, most),
    )
    return Question(side, _record(asked.get("turns"), uploads), generation, _whole(asked, "seed", 0, 2**32 - 1))


def _record(turns: Any, uploads: Uploads) -> Record:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("turns: must be a list of objects, at least one")
    if len(turns) > MOST_TURNS:
        raise DataError(f"the conversation has {len(turns)} questions, above {MOST_TURNS}; start a new one")
    keys = [_keys(turn) for turn in turns]
    shown = [key for own in keys for key in own]
    if len(shown) > MOST_IMAGES:
        raise DataError(f"the conversation has {len(shown)} images, above {MOST_IMAGES}; start a new one")
    placed = any(keys[1:])  # else all come before the first question, as in a row of a table
    read = []
    for number, turn in enumerate(turns):
        question = _text(turn, "question")
        if not (question or keys[number]):
            raise DataError("ask something, or add an image")
        answers = (_text(turn, "answer"),) if number < len(turns) - 1 else ()
        read.append(Turn(question, answers, (0,) * (len(keys[number]) if placed else 0)))
    return Record(tuple(read), tuple(uploads.of(key).content for key in shown))


def _keys(turn: dict[str, Any]) -> list[str]:
    keys = turn.get("images", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DataError("images: must be a list of keys")
    return keys


def _text(turn: dict[str, Any], name: str) -> str:
    text = turn.get(name, "")
    if not isinstance(text, str):
        raise DataError(f"{name}: must be a text")
    if len(text) > MOST_CHARACTERS and name == "question":
        raise DataError(f"the question has {len(text)} characters, above {MOST_CHARACTERS}; shorten it")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise DataError(f"{name}: has half of a character (a lone surrogate); type it again")
    return text


def _number(asked: dict[str, Any], name: str, least: float, most: float) -> float:
    value = asked.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:  # or it is NaN
        raise DataError(f"{_words(name)}: must be a number from {least:g} to {most:g}")
    return float(value)


def _whole(asked: dict[str, Any], name: str, least: int, most: int) -> int:
    value = asked.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise DataError(f"{_words(name)}: must be a whole number from {least} to {most}")
    return value


def _words(name: str) -> str:
    """What the page calls a field."""
    return {"max_new_tokens": "max tokens"}.get(name, name)
