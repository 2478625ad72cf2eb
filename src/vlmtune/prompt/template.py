"""Conversations of stand-in texts, used to analyse a chat template."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

TEXT = "\u2402text{}\u2402"
"""The stand-in for a text while the template is rendered."""


Shape = tuple[bool, tuple[str, ...]]
"""Whether there is a system prompt; and for each question the order of its images (`i`) and pieces of text (`t`)."""


def conversation(shape: Shape) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages in transformers' format with stand-ins for the texts, and the role of each text, in order."""
    with_system, turns = shape
    kinds: list[str] = []

    def text(kind: str) -> dict[str, str]:
        kinds.append(kind)
        return {"type": "text", "text": TEXT.format(len(kinds) - 1)}

    messages: list[dict[str, Any]] = []
    if with_system:
        messages.append({"role": "system", "content": [text("system")]})
    for order in turns:
        content = [{"type": "image"} if kind == "i" else text("question") for kind in order]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [text("answer")]})
    return messages, kinds


def content_of(turn: Any) -> list[tuple[str, str]]:
    """A question's images and pieces of text in order: ("i", "") and ("t", text). Empty pieces next to an image are
    dropped.
    """
    if not turn.image_at:
        return [("t", turn.question)]
    cuts = [0, *turn.image_at, len(turn.question)]
    out: list[tuple[str, str]] = []
    for number, (begin, end) in enumerate(pairwise(cuts)):
        out += [("i", "")] * (number > 0) + [("t", turn.question[begin:end])] * (end > begin)
    return out
