"""A row encoded by its family's own processor, called as in its documentation: the reference for our encoding."""

from __future__ import annotations

from typing import Any

from vlmtune.data.records import Record
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.labels import adds_special_tokens


def by_the_processor(encoder: Encoder, record: Record, *, answered: bool) -> Any:
    """The processor's output for a row's text and images, from one call."""
    processor = encoder.processor
    text, _ = encoder.render(record, answered=answered)
    pictures = [encoder.images.open(source) for source in record.images]
    own = processor.tokenizer
    processor.tokenizer = encoder.tokenizer  # it treats markers in a user's text as text
    try:
        return processor(
            text=[text],
            images=[pictures] if pictures else None,
            add_special_tokens=adds_special_tokens(encoder.tokenizer, text),
            return_tensors="pt",
        )
    finally:
        processor.tokenizer = own
