"""Conversations in the formats of data sets -> turns.

Two formats are read, distinguished by their keys. ShareGPT's, which LLaVA's data sets use:

    [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]

and OpenAI's chat format, in which content is a text or a list of parts:

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}]

Pairs such as {"user": "What is it?", "assistant": "A cat."} (The Cauldron) are read as two messages each.

`<image>` in a question, or a part of type image, stands for the row's next image. If there are parts of type image,
`<image>` stays text. The chat template decides where the model sees an image: LLaVA 1.5's puts images first. Nothing is
guessed: questions and answers must alternate, and the numbers of placeholders and images must match. Unused keys are
logged, or refused if they change the meaning of a row (`meanings`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.cells import as_list, from_json
from vlmtune.data.meanings import UnreadKeys
from vlmtune.data.messages import ROLE_KEYS, Message, MessageReader, kind_of_part
from vlmtune.data.records import Turn
from vlmtune.errors import DataError


@dataclass
class Conversation:
    """A parsed cell."""

    turns: tuple[Turn, ...]
    system: str | None = None
    images: list[Any] = field(default_factory=list)
    """One per placeholder, in order: the image in the message itself (a path or a data URL), or None for the row's next
    image."""


def parse(cell: Any, *, answers_required: bool, unread: UnreadKeys | None = None) -> Conversation:
    """Read a conversation: a list of messages, or its JSON.

    The last message is an answer to train on; without `answers_required` it may be missing, and is dropped if present.
    `unread` collects unused keys. Raises DataError that names the message, counted from 1.
    """
    messages = _messages(cell)
    reader = MessageReader(unread or UnreadKeys(training=answers_required), _has_image_parts(messages))
    found = Conversation(())
    turns: list[Turn] = []
    question: Message | None = None
    for number, value in enumerate(messages, start=1):
        try:
            message = reader.read(value, found.images)
            if message.role == "system":
                _check_system(message, first=not turns and question is None)
                found.system = message.text if found.system is None else f"{found.system}\n{message.text}"
            elif message.role == "user":
                if question is not None:
                    raise DataError("two questions in a row; join them in one message")
                question = message
            else:
                turns.append(_turn(question, message, answers_required))
                question = None
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    if question is not None:
        if answers_required:
            raise DataError("the conversation ends with a question")
        turns.append(Turn(question.text, (), question.places))
    if not turns:
        raise DataError("the conversation has no question")
    found.turns = tuple(turns)
    return found


def _check_system(message: Message, *, first: bool) -> None:
    if not first:
        raise DataError("a system prompt must come first")
    if message.places:
        raise DataError("an image in a system prompt")


def _turn(question: Message | None, answer: Message, answers_required: bool) -> Turn:
    if question is None:
        raise DataError("an answer without a question")
    if answer.places:
        raise DataError("an image in an answer")
    if answers_required and not answer.text.strip():
        raise DataError("empty answer")
    return Turn(question.text, (answer.text,) if answer.text.strip() else (), question.places, answer.trained)


def _messages(cell: Any) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = from_json(cell)
        except json.JSONDecodeError as error:
            raise DataError(f"conversation is not JSON: {error}") from None
        except DataError as error:
            raise DataError(f"conversation is {error}") from None
    cell = _by_message(as_list(cell))
    if isinstance(cell, str) or not isinstance(cell, Sequence) or not cell:
        raise DataError(f"conversation is {type(cell).__name__}; a list of messages is needed")
    return [message for item in cell for message in _of_pair(item)]


def _by_message(cell: Any) -> Any:
    """Older data sets have one list per key; convert it to messages. Anything else is unchanged."""
    lists = [as_list(value) for value in cell.values()] if isinstance(cell, dict) else []
    if not lists or not all(isinstance(value, list) for value in lists) or len(set(map(len, lists))) > 1:
        return cell
    return [dict(zip(cell, row, strict=True)) for row in zip(*lists, strict=True)]


def _of_pair(item: Any) -> list[Any]:
    """An item with both question and answer, as in The Cauldron, as two messages; a single message as it is."""
    asker = next((key for key in ("user", "human") if isinstance(item, dict) and key in item), None)
    if asker is None or "assistant" not in item or any(key in item for key in ROLE_KEYS):
        return [item]
    others = {key: value for key, value in item.items() if key not in (asker, "assistant")}
    question = {"role": "user", "content": item[asker]}
    return [question, {**others, "role": "assistant", "content": item["assistant"]}]


def _has_image_parts(messages: Iterable[Any]) -> bool:
    """Whether any message has an image part, so that `<image>` in a text is plain text."""
    contents = (as_list(value) for message in messages if isinstance(message, dict) for value in message.values())
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(isinstance(part, dict) and kind_of_part(part) in ("image", "image_url") for part in parts)
