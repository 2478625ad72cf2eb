"""Replaces each image placeholder by the image's text."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.prompt.rendering import Spans


def expanded(text: str, spans: Spans, placeholder: str, expansions: Sequence[str]) -> tuple[str, Spans]:
    """`text` with each placeholder replaced by the image's text, and `spans` moved accordingly."""
    head, *rest = text.split(placeholder) if placeholder else [text]
    starts, out = [], head
    for expansion, part in zip(expansions, rest, strict=True):
        starts.append(len(out))
        out += expansion + part
    growth = [len(expansion) - len(placeholder) for expansion in expansions]
    return out, [(_moved(begin, starts, growth), _moved(end, starts, growth)) for begin, end in spans]


def _moved(at: int, starts: list[int], growth: list[int]) -> int:
    """The new position of a character after placeholders grew. `starts`: of the expansions, in the new text."""
    for start, more in zip(starts, growth, strict=True):
        if start < at:
            at += more
    return at
