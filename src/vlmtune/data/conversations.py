"""Conversations as data sets hold them -> turns.

Two forms are read, told apart by their keys. ShareGPT's, which LLaVA's data sets use:

    [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]

and the one of OpenAI's chat interface, whose content is a text or a list of parts:

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}]

Pairs such as {"user": "What is it?", "assistant": "A cat."} (The Cauldron) are read as two messages each.

`<image>` in a question, or a part of type image, stands for the row's next image; beside parts of type image it stays
text. Whether the model sees an image where it is placed is for its chat template to say: LLaVA 1.5's puts images first.
Nothing is guessed: turns must take turns, and places and images must match in number. Keys that nothing reads are
named, or refused where they change what a row means (`meanings`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.cells import as_list, as_number, from_json, is_missing, says_nothing, text_of
from vlmtune.data.meanings import MESSAGES, PARTS, TOOL_ROLES, Unread
from vlmtune.data.records import Turn
from vlmtune.errors import DataError

PLACE = "<image>"
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
TRAINED_KEYS = ("weight", "loss", "train", "training")
"""Whether an answer is trained on: OpenAI's key (0 or 1), and those of ms-swift and Axolotl (true or false)."""
READ = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *TRAINED_KEYS))
READ_OF_TEXT = frozenset(("type", "text", "index"))
READ_OF_IMAGE = frozenset(("type", "image", "image_url", "path", "url", "bytes", "index"))


@dataclass
class Conversation:
    """A parsed cell."""

    turns: tuple[Turn, ...]
    system: str | None = None
    images: list[Any] = field(default_factory=list)
    """One for each place, in order: what a message carries itself (a path, or a data URL), or None for the next of the
    row's own images."""


@dataclass
class Message:
    """One message: `role` is system, user or assistant; images stand in front of the characters `places`."""

    role: str
    text: str
    places: tuple[int, ...]
    trained: bool = True


def parse(cell: Any, *, answers_required: bool, unread: Unread | None = None) -> Conversation:
    """Read a conversation: a list of messages, or its JSON.

    The last message is an answer to train on; without `answers_required` it may be missing, and is left off. `unread`
    collects the keys that nothing reads.
    Raises DataError that names the message, from 1.
    """
    messages = _messages(cell)
    reader = Reader(unread or Unread(training=answers_required), _has_image_parts(messages))
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
    """Older data sets hold one list for each key; as messages. Anything else is left as it is."""
    lists = [as_list(value) for value in cell.values()] if isinstance(cell, dict) else []
    if not lists or not all(isinstance(value, list) for value in lists) or len(set(map(len, lists))) > 1:
        return cell
    return [dict(zip(cell, row, strict=True)) for row in zip(*lists, strict=True)]


def _of_pair(item: Any) -> list[Any]:
    """The question and the answer of an item that holds both, as in The Cauldron; a message alone."""
    asker = next((key for key in ("user", "human") if isinstance(item, dict) and key in item), None)
    if asker is None or "assistant" not in item or any(key in item for key in ROLE_KEYS):
        return [item]
    others = {key: value for key, value in item.items() if key not in (asker, "assistant")}
    question = {"role": "user", "content": item[asker]}
    return [question, {**others, "role": "assistant", "content": item["assistant"]}]


def _has_image_parts(messages: Iterable[Any]) -> bool:
    """Whether any message shows an image by a part of its own, so that `<image>` in a text is a text."""
    contents = (as_list(value) for message in messages if isinstance(message, dict) for value in message.values())
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(isinstance(part, dict) and _kind(part) in ("image", "image_url") for part in parts)


def _kind(part: dict[str, Any]) -> Any:
    """The type of a part; Qwen's older form names it by the part's only key."""
    if part.get("type") is not None:
        return part["type"]
    kinds = [key for key, value in part.items() if not says_nothing(value)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in ("text", "image", "image_url") else None


class Reader:
    """Reads the messages of one conversation."""

    def __init__(self, unread: Unread, image_parts: bool):
        self.unread, self.image_parts = unread, image_parts

    def read(self, message: Any, images: list[Any]) -> Message:
        """A message; `images` gets what is known of each image in it."""
        if not isinstance(message, dict):
            raise DataError(f"is {type(message).__name__}; an object with a role and a content is needed")
        role = self._role(message)
        self.unread.check(message, READ, MESSAGES, "")
        content = as_list(_one_of(CONTENT_KEYS, message))
        if isinstance(content, list | tuple):
            text, at = self._joined(content, images)
        else:
            if content is None:
                keys = ", ".join(sorted(map(str, message)))
                raise DataError(f"has no content: its keys are {keys}; read is content, or value")
            if isinstance(content, dict):
                raise DataError("content is an object; a text or a list of parts is needed")
            text, at = placed(text_of(content, "content"))
            images += [None] * len(at)
        if role == "user" and (mark := media_mark(text, self.unread.media)):
            raise DataError(mark)
        if role == "user":
            self.unread.note_marks(text)
        return Message(role, text, at, self._is_trained(message, role))

    def _role(self, message: dict[str, Any]) -> str:
        said = _one_of(ROLE_KEYS, message)
        if said is None:
            keys = ", ".join(sorted(map(str, message))) or "none"
            raise DataError(f"has no role: its keys are {keys}; read are role and content, or from and value")
        if str(said) in TOOL_ROLES:
            raise DataError(f"role {said!r}: tools are not read; leave such rows out")
        if not isinstance(said, str) or said not in ROLES:
            raise DataError(f"role {said!r} is not read; choose from: {', '.join(ROLES)}")
        return ROLES[said]

    def _is_trained(self, message: dict[str, Any], role: str) -> bool:
        """Whether an answer is trained on. Raises DataError for a weight between, and for a question to train on."""
        trained = True
        for key in TRAINED_KEYS:
            value = message.get(key)
            if value is None or is_missing(value) or key in self.unread.ignored:
                continue
            number = as_number(value)
            if number not in (0, 1):
                raise DataError(f"{key} {value!s:.40}: 0 or 1 is needed; an answer is trained on or it isn't")
            if number == 1 and role != "assistant" and key != "weight":
                raise DataError(f"{key} {value}: only answers are trained on, and this is role {role}")
            trained = trained and number == 1
        return trained

    def _joined(self, content: Sequence[Any], images: list[Any]) -> tuple[str, tuple[int, ...]]:
        """The text of a list of parts, and the characters in front of which its images stand."""
        text, at = "", []
        for part in content:
            kind = _kind(part) if isinstance(part, dict) else type(part).__name__
            if kind == "text":
                self.unread.check(part, READ_OF_TEXT, PARTS, "a text part's ")
                if is_missing(part.get("text")):
                    raise DataError("a part of type text without a text")
                text += text_of(part["text"], "a part of type text")
            elif kind in ("image", "image_url"):
                self.unread.check(part, READ_OF_IMAGE, PARTS, "an image's ")
                at.append(len(text))
                images.append(self._source(part, sum(image is None for image in images)))
            else:
                keys = f" (its keys are {', '.join(map(str, part))})" if isinstance(part, dict) else ""
                raise DataError(f"a part of type {kind!r}{keys}; text, image and image_url are read")
        if self.image_parts:
            return text, tuple(at)
        text, places = placed(text)
        images += [None] * len(places)
        return text, places

    def _source(self, part: dict[str, Any], number: int) -> Any:
        """The image that a part carries: a path or content. None where it stands for the row's image `number`."""
        given = [part[key] for key in ("image_url", "image", "path", "url", "bytes") if not says_nothing(part.get(key))]
        if len(given) > 1:
            raise DataError("a part with two images; make it two parts")
        index = part.get("index")
        if given or says_nothing(index):
            value = given[0] if given else None
            if isinstance(value, dict) and "url" in value:
                self.unread.check(value, frozenset(("url",)), PARTS, "an image's ")
                return value["url"]
            return value
        if as_number(index) != number:
            raise DataError(f"an image of index {index}: the row's images are shown in order, and {number} is next")
        return None


def _one_of(keys: Sequence[str], message: dict[str, Any]) -> Any:
    """The value of the one of `keys` that is there; a file of two forms has both, one of them null."""
    given = [(key, message[key]) for key in keys if key in message and message[key] is not None]
    if len(given) > 1 and given[0][1] != given[1][1]:
        raise DataError(f"has both {given[0][0]} and {given[1][0]}; one of them is needed")
    return given[0][1] if given else None


# ---------------------------------------------------------------- marks in texts

MEDIA = re.compile(r"(?:^|\n)(?:<image>\s*)*<(video|audio)>(?=\S|\n|$)|<(video|audio)>\s*$")
"""A mark of LLaVA's notation for something else than an image: where a text begins, ends, or on a line of its own."""


def media_mark(text: str, anywhere: bool) -> str | None:
    """Why a question can't be used that shows a video or a sound by a mark: where LLaVA puts one, or `anywhere`."""
    if "<video>" not in text and "<audio>" not in text:
        return None
    found = re.search("<(video)>|<(audio)>", text) if anywhere else MEDIA.search(text)
    if found is None:
        return None
    kind = found[1] or found[2]
    return f"<{kind}> stands where a {'video' if kind == 'video' else 'sound'} is shown, and only images are read"


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
