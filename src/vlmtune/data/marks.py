"""Marks of LLaVA's notation in texts: `<image>` where an image stands, and others for what is not read."""

from __future__ import annotations

import re

PLACE = "<image>"

MEDIA = re.compile(r"(?:^|\n)(?:<image>\s*)*<(video|audio)>(?=\S|\n|$)|<(video|audio)>\s*$")
"""A mark of LLaVA's notation for something else than an image: where a text begins, ends, or on a line of its own."""


def media_mark(text: str, anywhere: bool) -> str | None:
    """Why a question can't be used that shows a video or a sound by a mark: where LLaVA puts one, or `anywhere`."""
    if "<video>" not in text and "<audio>" not in text:
        return None
    found = re.search("<(video)>|<(audio)>", text) if anywhere else MEDIA.search(text)
    if found is None:
        return None
    kind = found[1] or found[2]
    return f"<{kind}> stands where a {'video' if kind == 'video' else 'sound'} is shown, and only images are read"


def placed(text: str) -> tuple[str, tuple[int, ...]]:
    """`text` without its `<image>` marks, and the characters in front of which they stood.

    A line break between a mark at either end and the text belongs to the notation; the chat template writes its own.
    """
    pieces = text.split(PLACE)
    if len(pieces) == 1:
        return text, ()
    if not pieces[0]:
        first = next((n for n, piece in enumerate(pieces) if piece.strip("\n")), len(pieces) - 1)
        pieces[1 : first + 1] = [piece.removeprefix("\n") for piece in pieces[1 : first + 1]]
    if not pieces[-1]:
        pieces[-2] = pieces[-2].removesuffix("\n")
    at, out = [], pieces[0]
    for piece in pieces[1:]:
        at.append(len(out))
        out += piece
    return out, tuple(at)
