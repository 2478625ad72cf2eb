"""One message of a conversation: its role, its text, the positions of its images, and whether it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.cells import as_list, as_number, is_missing, says_nothing, text_of
from vlmtune.data.marks import media_mark, placed
from vlmtune.data.meanings import MESSAGES, PARTS, TOOL_ROLES, UnreadKeys
from vlmtune.errors import DataError

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
"""Keys for whether an answer is trained on: OpenAI's (0 or 1), and those of ms-swift and Axolotl (true or false)."""
READ = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *TRAINED_KEYS))
READ_OF_TEXT = frozenset(("type", "text", "index"))
READ_OF_IMAGE = frozenset(("type", "image", "image_url", "path", "url", "bytes", "index"))


@dataclass
class Message:
    """One message: `role` is system, user or assistant; `places` are the character positions of its images."""

    role: str
    text: str
    places: tuple[int, ...]
    trained: bool = True


def kind_of_part(part: dict[str, Any]) -> Any:
    """The type of a part; Qwen's older form names it by the part's only key."""
    if part.get("type") is not None:
        return part["type"]
    kinds = [key for key, value in part.items() if not says_nothing(value)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in ("text", "image", "image_url") else None


class MessageReader:
    """Reads the messages of one conversation."""

    def __init__(self, unread: UnreadKeys, image_parts: bool):
        self.unread, self.image_parts = unread, image_parts

    def read(self, message: Any, images: list[Any]) -> Message:
        """Read a message; appends what is known of its images to `images`."""
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
                raise DataError(f"has no content: its keys are {keys}; expected content or value")
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
            raise DataError(f"has no role: its keys are {keys}; expected role and content, or from and value")
        if str(said) in TOOL_ROLES:
            raise DataError(f"role {said!r}: tools are not supported; remove such rows")
        if not isinstance(said, str) or said not in ROLES:
            raise DataError(f"role {said!r} is not supported; choose from: {', '.join(ROLES)}")
        return ROLES[said]

    def _is_trained(self, message: dict[str, Any], role: str) -> bool:
        """Whether an answer is trained on. Raises DataError for a weight between 0 and 1, and for a weight of a
        question.
        """
        trained = True
        for key in TRAINED_KEYS:
            value = message.get(key)
            if value is None or is_missing(value) or key in self.unread.ignored:
                continue
            number = as_number(value)
            if number not in (0, 1):
                raise DataError(f"{key} {value!s:.40}: must be 0 or 1; an answer is trained on or it isn't")
            if number == 1 and role != "assistant" and key != "weight":
                raise DataError(f"{key} {value}: only answers are trained on, but this message has role {role}")
            trained = trained and number == 1
        return trained

    def _joined(self, content: Sequence[Any], images: list[Any]) -> tuple[str, tuple[int, ...]]:
        """The text of a list of parts, and the character positions of its images."""
        text, at = "", []
        for part in content:
            kind = kind_of_part(part) if isinstance(part, dict) else type(part).__name__
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
                raise DataError(f"a part of type {kind!r}{keys}; supported are text, image and image_url")
        if self.image_parts:
            return text, tuple(at)
        text, places = placed(text)
        images += [None] * len(places)
        return text, places

    def _source(self, part: dict[str, Any], number: int) -> Any:
        """The image in a part: a path or content. None if it stands for the row's image `number`."""
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
    """The value of whichever of `keys` is present. A file with mixed formats has both, one of them null."""
    given = [(key, message[key]) for key in keys if key in message and message[key] is not None]
    if len(given) > 1 and given[0][1] != given[1][1]:
        raise DataError(f"has both {given[0][0]} and {given[1][0]}; one of them is needed")
    return given[0][1] if given else None
