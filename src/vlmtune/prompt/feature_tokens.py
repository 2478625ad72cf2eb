"""Tokens that stand for image features, thousands of a kind in a row: tokenized as one and repeated afterwards.

Added tokens are split off a text before anything else, so their number changes nothing around them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vlmtune.errors import ModelError


class Shortened(NamedTuple):
    """An image's expansion with each run of feature tokens as one of them."""

    text: str
    counts: list[int]
    """Tokens of each run."""


class FeatureTokens:
    """Shortens the runs of one tokenizer's feature token, and repeats it in the rows that were tokenized."""

    def __init__(self, token: str, tokenizer: Any):
        self.token = token
        self.id: int | None = tokenizer.get_added_vocab().get(token)
        """None where it is no added token: runs of it are then tokenized as they are."""

    def shortened(self, expansion: str) -> Shortened:
        """`expansion` with one token in place of each run of them."""
        if self.id is None:
            return Shortened(expansion, [])
        run = re.compile(f"(?:{re.escape(self.token)})+")
        counts = [len(found) // len(self.token) for found in run.findall(expansion)]
        return Shortened(run.sub(self.token, expansion), counts)

    def repeat(self, ids: list[int], labels: list[int], counts: list[int]) -> None:
        """Write each feature token of one row, and its label, as often as `counts` say, in order.

        Raises ModelError where the row has more or fewer feature tokens than counts.
        """
        at = [n for n, i in enumerate(ids) if i == self.id] if counts else []
        if len(at) != len(counts):
            raise ModelError(f"{len(at)} places for image features in a prompt that shows {len(counts)} runs of them")
        for n, count in zip(reversed(at), reversed(counts), strict=True):
            ids[n : n + 1] = [ids[n]] * count
            labels[n : n + 1] = [labels[n]] * count
