"""LLaVA's placeholders in texts: `<image>`, and others for media that are not supported."""

from __future__ import annotations

import re

PLACE = "<image>"

MEDIA = re.compile(r"(?:^|\n)(?:<image>\s*)*<(video|audio)>(?=\S|\n|$)|<(video|audio)>\s*$")
"""A LLaVA placeholder for other media than images: at the start or end of a text, or on a line of its own."""


def media_mark(text: str, anywhere: bool) -> str | None:
    """Why a question with a placeholder for video or audio can't be used. Only positions where LLaVA puts one count, or
    any position if `anywhere`.
    """
    if "<video>" not in text and "<audio>" not in text:
        return None
    found = re.search("<(video)>|<(audio)>", text) if anywhere else MEDIA.search(text)
    if found is None:
        return None
    kind = found[1] or found[2]
    return f"<{kind}> is a placeholder for {'a video' if kind == 'video' else 'audio'}, and only images are supported"


def placed(text: str) -> tuple[str, tuple[int, ...]]:
    """`text` without its `<image>` placeholders, and their character positions.

    A line break between the text and a placeholder at either end is part of the notation; the chat template writes
    its own.
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
