"""Columns and keys in other programs' data sets that change the meaning of a row and are not supported here.

A row with a value in one of them is refused by name: the formats of LLaVA, ShareGPT, OpenAI, Qwen, ms-swift,
LLaMA-Factory, Axolotl and TRL each have some. All other unused names are only logged.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmtune.data.cells import is_image, is_media, is_one, is_structure, is_truth, says_nothing, to_json
from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")
SHOWN = 40
"""Maximum length of a value in a message, in characters."""


@dataclass(frozen=True)
class Meaning:
    """What a value with this name means, and what to do instead."""

    what: str
    way: str = ""
    when: str = "any"
    """Values that change a row: `any`, a `structure` (a list or an object), a `truth` value (a boolean), an `image`, a
    video or audio as `media`, `not one`, or `not auto`."""
    beside: str = ""
    """The name only has this meaning together with this question column."""
    of_answer: bool = False
    """It only matters for training, so a prediction ignores it."""

    def holds(self, value: Any) -> bool:
        """Whether `value` changes the meaning of its row."""
        return (
            not says_nothing(value)
            and {
                "any": lambda: True,
                "structure": lambda: is_structure(value),
                "truth": lambda: is_truth(value),
                "image": lambda: is_image(value),
                "media": lambda: is_media(value),
                "not one": lambda: not is_one(value),
                "not auto": lambda: value != "auto",
            }[self.when]()
        )


VIDEO = Meaning("a video", "videos are not supported; use a few frames as a list of images")
AUDIO = Meaning("audio", "audio is not supported")
TOOLS = Meaning("tools", "tool calls are not supported; remove such rows")
REASONING = Meaning(
    "the reasoning before an answer", "put it into the answer as the model should write it", of_answer=True
)
PREFERENCE = Meaning(
    "preference data", "each row trains on one answer: name its column with data.columns.answer", of_answer=True
)
SIZE = Meaning("a size per image", "set model.image.max_tokens and min_tokens for all images")
BOXES = Meaning(
    "positions in the image", "boxes and points are not supported; write them into the texts", of_answer=True
)
WEIGHT = Meaning("a row weight", "all rows have the same weight; repeat or remove rows", "not one", of_answer=True)
SEVERAL = Meaning("another image of the row", "put several images of a row into one column, as a list")
SYSTEM = Meaning("a system prompt", "name its column: data.columns.system=...")
HISTORY = Meaning("earlier turns", "write whole conversations: data=messages or data=conversations", "structure")
TEMPLATE = Meaning("arguments for the chat template", "the template is called with the same arguments for all rows")
OPTIONS = Meaning("multiple-choice options", "write them into the question", "structure")
SECOND_HALF = Meaning("the second half of an instruction", "join both in one column", beside="instruction")
VIEW = Meaning("a transformation of an image", "change the image's file")
MASK = Meaning("whether an answer is trained on", "write it as weight: 0 or 1", of_answer=True)
CONTENT = Meaning("an image's content", "give a path or a data URL under image_url")
FILE = Meaning("a file", "only text and images are supported")

SHAPES = ("bbox", "bboxes", "box", "boxes", "bounding_box", "bounding_boxes", "box_2d", "point_2d")
SIZES = ("max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width")
VIDEOS = ("video", "videos", "video_url", "video_path", "video_paths")
AUDIOS = ("audio", "audios", "audio_url", "audio_path", "audio_paths", "input_audio")
THINKING = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "thinking_content")
CALLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_choice")
PAIRS = (
    "rejected",
    "chosen",
    "rejected_response",
    "chosen_response",
    "rejected_messages",
    "rejected_images",
    "kto_tag",
)


def _table(*groups: tuple[Iterable[str], Meaning]) -> dict[str, Meaning]:
    return {name: meaning for names, meaning in groups for name in names}


COLUMNS = _table(
    (VIDEOS, VIDEO),
    (AUDIOS, AUDIO),
    (CALLS, TOOLS),
    (THINKING, REASONING),
    (PAIRS, PREFERENCE),
    (["label"], replace(PREFERENCE, when="truth")),
    (SIZES, SIZE),
    (["crop"], replace(SIZE, when="structure")),
    (["nframes", "fps"], VIDEO),
    (["vid", "clip", "clips", "gif"], replace(VIDEO, when="media")),
    (["frames"], replace(SEVERAL, when="structure")),
    (["sound", "sounds", "speech", "wav"], replace(AUDIO, when="media")),
    (SHAPES, BOXES),
    (["mask", "masks", "segmentation", "polygon", "polygons", "keypoints"], BOXES),
    (["objects", "ref", "refs", "point", "points"], replace(BOXES, when="structure")),
    (["region", "regions", "rect", "quad", "xyxy", "xywh", "coordinates"], replace(BOXES, when="structure")),
    (["weight", "weights", "sample_weight", "example_weight", "loss_weight", "loss_scale"], WEIGHT),
    (["loss_mask", "prompt_weight", "prompt_loss_weight"], WEIGHT),
    (["images", "second_image", "right_image", *(f"image{n}" for n in range(2, 10))], SEVERAL),
    ([f"image_{n}" for n in range(2, 10)], SEVERAL),
    (["right", "image_right", "img2", "img_2", "image_b", "after", "image_after"], replace(SEVERAL, when="image")),
    (["image_path2", "image_path_2", "path2", "candidate", "target_image"], replace(SEVERAL, when="image")),
    (["system", "system_prompt", "system_message", "system_instruction"], SYSTEM),
    (["history"], HISTORY),
    (["choices", "options"], OPTIONS),
    (["input"], SECOND_HALF),
    (["chat_template_kwargs", "chat_template", "enable_thinking", "add_generation_prompt"], TEMPLATE),
    (["mm_processor_kwargs", "processor_kwargs", "images_kwargs"], replace(SIZE, what="arguments for the processor")),
    (["documents"], replace(TEMPLATE, when="structure")),
)
"""Names in a table, or in the objects of a file."""

MESSAGES = _table(
    (VIDEOS, VIDEO),
    (AUDIOS, AUDIO),
    (CALLS, TOOLS),
    (THINKING, REASONING),
    (PAIRS, PREFERENCE),
    (SIZES, SIZE),
    (SHAPES, BOXES),
    (["objects"], BOXES),
    (["mask", "masked", "loss_mask", "trainable", "is_trained", "train_on", "train_on_turn", "compute_loss"], MASK),
    (["learn", "ignore", "do_train", "supervised"], MASK),
    (["tool_plan"], TOOLS),
    (["loss_scale", "loss_weight", "train_detail"], replace(WEIGHT, what="a weight for single words")),
    (["image", "images", "image_url"], Meaning("images in a message", "put them into the row or into the content")),
    (["files", "file", "attachments", "documents"], FILE),
    (["refusal"], Meaning("a refusal instead of an answer", "write it as the content", of_answer=True)),
)
"""Names in one message of a conversation."""

PARTS = _table(
    (SIZES, SIZE),
    (["detail"], replace(SIZE, when="not auto")),
    (["crop", "crops", "image_size", "size", "resize", "max_tokens", "min_tokens", "do_resize"], SIZE),
    (["num_crops", "max_crops", "num_tiles", "max_tiles", "max_num", "max_dynamic_patch"], SIZE),
    (["rotate", "rotation", "region", "flip"], VIEW),
    (["weight", "loss", "train", "loss_scale"], replace(WEIGHT, what="a weight for a part of a message")),
    ([*VIDEOS, "nframes", "fps", "video_start", "video_end"], VIDEO),
    (AUDIOS, AUDIO),
    (["source", "data", "base64", "b64_json", "file_id"], CONTENT),
    (["file", "file_data", "document"], FILE),
    ([*SHAPES, "mask", "objects"], BOXES),
    (["text"], Meaning("a text in an image part", "make it a part of type text")),
    (["image", "image_url"], Meaning("an image in a text part", "make it a part of type image")),
)
"""Names in a part of a message's content, in its `image_url`, or in an image object."""

FOREIGN = re.compile(r"<img>[^<]+</img>|<image[ _]\d+>|<\|image(_\d+|_pad)?\|>|<image_placeholder>|<ImageHere>")
"""Image placeholders of Qwen-VL, MMMU, Phi-3, Qwen2-VL, DeepSeek-VL and InternLM-XComposer."""

TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")
"""Roles of tool messages."""


def meaning_of(name: str, table: Mapping[str, Meaning]) -> Meaning | None:
    """What a name means, ignoring case and the kind of dash."""
    return table.get(name.casefold().replace("-", "_"))


class UnreadKeys:
    """Unused names: refused if they change the meaning of a row, else counted and logged once.

    `ignored`: names that the user ignores on purpose. `training`: whether answers matter too.
    """

    def __init__(self, ignored: Collection[str] = (), training: bool = True):
        self.ignored, self.training = frozenset(ignored), training
        self.media = False
        """Whether the table has a video or audio column, so that `<video>` in a text is a placeholder."""
        self.keys: Counter[str] = Counter()
        """Keys of messages and images, and how often they had a value."""
        self.marks: Counter[str] = Counter()
        """Placeholders of other formats in questions, and how many questions have them."""
        self.logged = False

    def meaning(self, name: str, table: Mapping[str, Meaning]) -> Meaning | None:
        """The meaning of an unused name, if it is refused."""
        found = meaning_of(name, table)
        return None if found is None or name in self.ignored or (found.of_answer and not self.training) else found

    def check(self, owner: Mapping[Any, Any], read: frozenset[str], table: Mapping[str, Meaning], where: str) -> None:
        """Check the keys of `owner` that are not in `read`. Raises DataError that begins with `where`."""
        for key in owner.keys() - read:
            value, name = owner[key], str(key)
            meaning = self.meaning(name, table)
            if meaning is not None and meaning.holds(value):
                raise DataError(f"{where}{refusal(name, meaning, value)}")
            if meaning is None and name not in self.ignored and not says_nothing(value):
                self.keys[name] += 1

    def note_marks(self, question: str) -> None:
        """Count a question with another program's image placeholder."""
        if ("<im" in question or "<|im" in question or "<Im" in question) and (found := FOREIGN.search(question)):
            self.marks[found[0]] += 1

    def log(self, file: str) -> None:
        """Log, once, the unused keys and the placeholders that stay text."""
        if self.marks and not self.logged:
            count, example = sum(self.marks.values()), next(iter(self.marks))
            log.warning(
                "%s: %d questions contain a marker such as %s, which stays text: the image placeholder is <image>",
                *(file, count, example),
            )
            self.logged = True
        if self.keys:
            log.info("%s: keys of messages not read: %s", file, ", ".join(self.keys))
            self.ignored |= self.keys.keys()
            self.keys.clear()


def refusal(name: str, meaning: Meaning, value: Any) -> str:
    """Why a row with `value` under `name` can't be used, and what to do."""
    way = f"; {meaning.way}" if meaning.way else ""
    return f"{name!r} holds {meaning.what}: {_shown(value)}{way}; to ignore it: data.ignore=[{name}]"


def _shown(value: Any) -> str:
    text = to_json(value, lambda other: f"<{type(other).__name__}>")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
