"""Counts the tokens of rows, reading only the sizes of their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlmtune import display
from vlmtune.data.records import Record
from vlmtune.prompt.image_inputs import ImageProcessing
from vlmtune.prompt.labels import adds_special_tokens

CHUNK = 1024
"""Number of rows that are tokenized in one call."""


def measured(
    records: Sequence[Record], text_of: Callable[[Record], str], images: ImageProcessing, tokenizer: Any
) -> list[tuple[int, int]]:
    """Number of tokens of each row's images, and of its text.

    `text_of`: returns the whole text of a row, with one token for each image.
    """
    found = []
    with display.bar("measuring rows", len(records), show=len(records) > 20 * CHUNK) as advance:
        for start in range(0, len(records), CHUNK):
            rows = [records[i] for i in range(start, min(start + CHUNK, len(records)))]
            sizes = [tuple(map(images.size, row.images)) for row in rows]
            texts = [text_of(row) for row in rows]
            ids = tokenizer(texts, add_special_tokens=adds_special_tokens(tokenizer, texts[0]))["input_ids"]
            found += [(images.tokens(s), len(row) - len(s)) for s, row in zip(sizes, ids, strict=True)]
            advance(len(rows))
    return found
