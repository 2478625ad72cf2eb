"""The lengths of rows in tokens, from the sizes of their images and their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.config.schema import Config
from vlmtune.data.images import image_size
from vlmtune.data.records import Record
from vlmtune.planning.rows import Crossed, Patches, Row, shape_of

LETTERS = 3.0
"""Letters that make a token, at the least, where there is no tokenizer to ask; English has about four."""
TEMPLATE = 30
"""Tokens of a chat template around a question and an answer, with a short system prompt."""


@dataclass(frozen=True)
class Lengths:
    """Of all training rows."""

    counts: list[tuple[int, int]]
    """Tokens of each row's images and of its text."""
    measured: bool
    """By the processor itself; else by rules of thumb."""

    @property
    def longest(self) -> int:
        """The number of the longest row."""
        return max(range(len(self.counts)), key=lambda row: sum(self.counts[row]))

    def __str__(self) -> str:
        images, rows = [image for image, _ in self.counts], [image + text for image, text in self.counts]
        by = "counted by the processor" if self.measured else "estimated from image headers and letters"
        shown = [f"{name} {int(value)}" for name, value in zip(NAMES, _quantiles(rows), strict=True)]
        of_images = "/".join(str(int(value)) for value in _quantiles(images))
        return f"{len(rows)} rows, tokens of a row: {', '.join(shown)} (of images {of_images}), {by}"


NAMES = ("median", "p95", "longest")


def _quantiles(counts: list[int]) -> list[float]:
    return [float(value) for value in np.quantile(counts, (0.5, 0.95, 1.0), method="higher")]


def estimated(records: Sequence[Record], config: Config, architecture: Any) -> Lengths:
    """Lengths without a processor: an image's tokens follow from its size, or are the most that the family allows."""
    shape, limits = shape_of(architecture), config.model.image
    most = shape.tokens(limits.max_tokens)

    def image_tokens(source: Any) -> int:
        if not isinstance(shape, Patches):
            return most
        side = shape.vision.patch_size * shape.vision.spatial_merge_size
        width, height = image_size(source, config.data.max_image_pixels)
        return int(min(max(round(width / side) * round(height / side), limits.min_tokens or 4), most))

    def text_tokens(record: Record) -> int:
        letters = sum(len(turn.question) + sum(map(len, turn.answers[:1])) for turn in record.turns)
        return int(letters / LETTERS) + TEMPLATE

    counts = []
    for record in records:
        images = sum(map(image_tokens, record.images))
        counts.append((len(record.images) if isinstance(shape, Crossed) else images, text_tokens(record)))
    return Lengths(counts, measured=False)


def row_of(lengths: Lengths, records: Sequence[Record]) -> Row:
    """The longest row as an assumed one."""
    number = lengths.longest
    image, text = lengths.counts[number]
    answer = sum(len(turn.answers[0]) for turn in records[number].turns if turn.answers)
    return Row(image, text, min(int(answer / LETTERS) + 2, text - 1))
