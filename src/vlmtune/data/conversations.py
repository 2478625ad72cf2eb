"""Conversations as data sets hold them -> turns.

Two forms are read, told apart by their keys. ShareGPT's, which LLaVA's data sets use:

    [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]

and the one of OpenAI's chat interface, whose content is a text or a list of parts:

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}]

`<image>` in a question, or a part of type image, stands for the row's next image; inside a part of type text it stays
text. Whether the model sees an image where it is placed is for its chat template to say: LLaVA 1.5's puts images first.
Nothing is guessed: turns must take turns, and places and images must match in number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.records import Turn
from vlmtune.errors import DataError, nearest

PLACE = "<image>"
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


@dataclass
class Conversation:
    """A parsed cell."""

    turns: tuple[Turn, ...]
    system: str | None = None
    images: list[Any] = field(default_factory=list)
    """One for each place, in order: what a message carries itself (a path, or a data URL), or None for the next of the
    row's own images."""


def parse(cell: Any, *, answers_required: bool) -> Conversation:
    """Read a conversation: a list of messages, or its JSON.

    The last message is an answer to train on; without `answers_required` it may be missing, and is left off.
    Raises DataError that names the message, from 1.
    """
    messages = _messages(cell)
    found = Conversation(())
    turns: list[Turn] = []
    question: tuple[str, tuple[int, ...]] | None = None
    for number, message in enumerate(messages, start=1):
        role, text, places = _read(message, number, found.images)
        if role == "system":
            if turns or question:
                raise DataError(f"message {number}: a system prompt must come first")
            found.system = text if found.system is None else f"{found.system}\n{text}"
        elif role == "user":
            if question is not None:
                raise DataError(f"message {number}: two questions in a row")
            question = (text, places)
        else:
            if question is None:
                raise DataError(f"message {number}: an answer without a question")
            if places:
                raise DataError(f"message {number}: an image in an answer")
            if answers_required and not text.strip():
                raise DataError(f"message {number}: empty answer")
            turns.append(Turn(question[0], (text,) if text.strip() else (), question[1]))
            question = None
    if question is not None:
        if answers_required:
            raise DataError("the conversation ends with a question")
        turns.append(Turn(question[0], (), question[1]))
    if not turns:
        raise DataError("the conversation has no question")
    found.turns = tuple(turns)
    return found


def _messages(cell: Any) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            raise DataError(f"conversation is not JSON: {error}") from None
    cell = as_list(cell)
    if not isinstance(cell, Sequence) or not cell:
        raise DataError(f"conversation is {type(cell).__name__}; a list of messages is needed")
    return list(cell)


def as_list(cell: Any) -> Any:
    """Parquet gives arrays for lists; anything else is left as it is."""
    return cell.tolist() if hasattr(cell, "tolist") else cell


def _read(message: Any, number: int, images: list[Any]) -> tuple[str, str, tuple[int, ...]]:
    """Role, text, and the characters in front of which images stand; `images` gets what is known of each."""
    if not isinstance(message, dict):
        raise DataError(f"message {number} is {type(message).__name__}; an object with a role and a content is needed")
    said = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(said, str) or said not in ROLES:
        raise DataError(f"message {number}: role {said!r}; {nearest(str(said), ROLES)}")
    if isinstance(content, str):
        text, places = placed(content)
        images += [None] * len(places)
        return ROLES[said], text, places
    content = as_list(content)
    if not isinstance(content, Sequence):
        raise DataError(f"message {number}: content is {type(content).__name__}; a text or a list of parts is needed")
    text, at = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"message {number}: a part of type text without a text")
            text += part["text"]
        elif kind in ("image", "image_url"):
            at.append(len(text))
            images.append(_source(part))
        else:
            raise DataError(f"message {number}: a part of type {kind!r}; text, image and image_url are read")
    return ROLES[said], text, tuple(at)


def _source(part: dict[str, Any]) -> Any:
    """The image that a part carries: a path or content. None where it stands for the next one of the row's images."""
    value = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def placed(text: str) -> tuple[str, tuple[int, ...]]:
    """`text` without its `<image>` marks, and the characters in front of which they stood.

    A line break between a mark at either end and the text belongs to the notation; the chat template writes its own.
    """
    pieces = text.split(PLACE)
    if len(pieces) == 1:
        return text, ()
    if not pieces[0]:
        first = next((n for n, piece in enumerate(pieces) if piece.strip("\n")), len(pieces) - 1)
        pieces[1 : first + 1] = [piece.removeprefix("\n") for piece in pieces[1 : first + 1]]
    if not pieces[-1]:
        pieces[-2] = pieces[-2].removesuffix("\n")
    at, out = [], pieces[0]
    for piece in pieces[1:]:
        at.append(len(out))
        out += piece
    return out, tuple(at)
