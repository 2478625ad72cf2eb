"""Tokens that stand for image features, thousands of a kind in a row: tokenized as one and repeated afterwards.

Added tokens are split off a text before anything else, so their number changes nothing around them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Shortened(NamedTuple):
    """An image's expansion with each run of feature tokens as one of them."""

    text: str
    counts: list[int]
    """Tokens of each run."""


def shortened(expansion: str, token: str) -> Shortened:
    """`expansion` with one `token` in place of each run of them."""
    run = re.compile(f"(?:{re.escape(token)})+")
    return Shortened(run.sub(token, expansion), [len(found) // len(token) for found in run.findall(expansion)])


def repeat(row: list[int], places: list[int], counts: list[int]) -> None:
    """Have the items of `row` at `places` stand there as often as `counts` say."""
    for place, count in zip(reversed(places), reversed(counts), strict=True):
        row[place : place + 1] = [row[place]] * count
