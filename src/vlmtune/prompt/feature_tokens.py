"""Tokens for image features, thousands of the same in a row: tokenized as one token and repeated afterwards.

Added tokens are split off before the rest of a text is tokenized, so their number does not affect the text around them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vlmtune.errors import ModelError


class Shortened(NamedTuple):
    """An image's expansion with each run of feature tokens reduced to one token."""

    text: str
    counts: list[int]
    """Number of tokens in each run."""


class FeatureTokens:
    """Shortens runs of a tokenizer's feature token, and repeats the token in tokenized rows."""

    def __init__(self, token: str, tokenizer: Any):
        self.token = token
        self.id: int | None = tokenizer.get_added_vocab().get(token)
        """None if it is not an added token: its runs are then tokenized as they are."""

    def shortened(self, expansion: str) -> Shortened:
        """`expansion` with each run replaced by one token."""
        if self.id is None:
            return Shortened(expansion, [])
        run = re.compile(f"(?:{re.escape(self.token)})+")
        counts = [len(found) // len(self.token) for found in run.findall(expansion)]
        return Shortened(run.sub(self.token, expansion), counts)

    def repeat(self, ids: list[int], labels: list[int], counts: list[int]) -> None:
        """Repeat each feature token of a row, and its label, by the numbers in `counts`, in order.

        Raises ModelError if the numbers of feature tokens and counts differ.
        """
        at = [n for n, i in enumerate(ids) if i == self.id] if counts else []
        if len(at) != len(counts):
            raise ModelError(f"a prompt has {len(at)} image feature tokens for {len(counts)} runs of them")
        for n, count in zip(reversed(at), reversed(counts), strict=True):
            ids[n : n + 1] = [ids[n]] * count
            labels[n : n + 1] = [labels[n]] * count
