"""A tokenizer's added tokens, used to compare supervised texts with supervised tokens."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any


class AddedTokens:
    """Added tokens that a tokenizer matches before anything else, wherever they are in a text.

    Excludes single bytes (`<0x0A>`), and tokens that need a word boundary or absorb adjacent spaces.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def among(self, ids: Sequence[int]) -> list[int]:
        """The added tokens in `ids`, in order."""
        return [i for i in ids if i in self._ids]

    def named_in(self, text: str) -> list[int]:
        """Ids of the added tokens whose names are in `text`, in order."""
        return [self.tokenizer.convert_tokens_to_ids(name) for name in self._name.findall(text)]

    def comparable(self, text: str) -> str:
        """A text in the normal form in which decoded tokens are compared.

        Tokenizers may compose accents, drop outer spaces, and write a space after an added token (Llama's).
        """
        return self._with_space_around.sub(r"\1", unicodedata.normalize("NFC", text)).strip()

    @functools.cached_property
    def _ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        plain = (i for i, t in added if not (t.single_word or t.lstrip or t.rstrip or (t.normalized and not t.special)))
        return {i for i in plain if not re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(i))}

    @functools.cached_property
    def _name(self) -> re.Pattern[str]:
        names = map(self.tokenizer.convert_ids_to_tokens, self._ids)
        return re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)")

    @functools.cached_property
    def _with_space_around(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._name.pattern})\s*")
