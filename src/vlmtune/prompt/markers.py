"""Markers inside a user's text: control markers stay plain text, other added tokens are encoded as those tokens.

A control marker (`<|im_end|>`, `<image>`) would end the turn or insert an image. Its first character is replaced by a
stand-in that the tokenizer's normalizer turns back after special tokens were matched. Control markers are those that
the chat template writes, image placeholders, and the tokenizer's named tokens (begin, end, padding). Other added tokens
in a text (boxes, references, locations, points, reasoning) are encoded as those tokens.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from PIL import Image


class Markers:
    """The markers of one processor, and a tokenizer that reads stand-ins as the original characters."""

    def __init__(self, processor: Any, family: Any):
        self.processor, self.family = processor, family
        special = {t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
        own = {family.image_token or "<image>", family.feature_token, *family.ends}
        self.names = sorted(special | own)
        """Strings with a special meaning for the tokenizer or the processor."""
        self._always = own | self._named()
        self.tokenizer, self.stand_ins = with_stand_ins(processor.tokenizer, self.names)
        self._letters = str.maketrans({stand_in: first for first, stand_in in self.stand_ins.items()})
        self._marker = re.compile("|".join(sorted(map(re.escape, self.names), key=len, reverse=True)))

    def _named(self) -> set[str]:
        """Tokens that the tokenizer or the processor has as an attribute: begin, end, padding, image, video."""
        named = {value for value in self.processor.tokenizer.special_tokens_map.values() if isinstance(value, str)}
        return named | {v for k, v in vars(self.processor).items() if k.endswith("_token") and isinstance(v, str)}

    def is_control(self, marker: str) -> bool:
        """Whether `marker` controls the conversation or stands for an image, and so stays text in a user's text."""
        if marker in self._always or marker in str(self.processor.chat_template):
            return True
        return _numberless(marker) in self._around_images

    @functools.cached_property
    def _around_images(self) -> set[str]:
        """Markers that images expand to, without their numbers (`<row_1_col_2>`)."""
        sides = ((64, 64), (2000, 500), (500, 2000))
        _, expansions = self.family.images([[Image.new("RGB", size)] for size in sides])
        return {_numberless(found) for text in expansions for found in self._marker.findall(text)}

    def literal(self, text: str) -> str:
        """`text` with stand-ins, so that no control marker in it takes effect."""
        at = 0
        while match := self._marker.search(text, at):
            at = match.start()
            if self.is_control(match[0]):
                text = text[:at] + self.stand_ins[text[at]] + text[at + 1 :]
            else:
                at = match.end()
        return text

    def as_written(self, text: str) -> str:
        """`text` with stand-ins replaced by the original characters."""
        return text.translate(self._letters)

    def kept_as_text(self, text: str) -> list[str]:
        """The control markers in a user's text."""
        return [found for found in self._marker.findall(text) if self.is_control(found)]


def _numberless(marker: str) -> str:
    return re.sub(r"\d+", "", marker)


def with_stand_ins(tokenizer: Any, markers: list[str]) -> tuple[Any, dict[str, str]]:
    """A copy of `tokenizer` that turns noncharacters back into the first characters of `markers`, and the mapping.

    Special tokens are matched before normalization, so a character that the normalizer restores can't start one; those
    declared to match after it (`normalized`, in old Llama files) are declared again. Each stand-in replaces one
    character, so offsets stay right.
    """
    from tokenizers import AddedToken, normalizers

    firsts = sorted({marker[0] for marker in markers})
    stand_ins = {
        first: chr(0xFDD0 + n) for n, first in enumerate(firsts)
    }  # noncharacters: never used in text interchange
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    late = [token for token in backend.get_added_tokens_decoder().values() if token.normalized]
    backend.add_special_tokens(
        [
            AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            for t in late
            if t.content in markers
        ]
    )
    steps = [normalizers.Replace(stand_in, first) for first, stand_in in stand_ins.items()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer, stand_ins
