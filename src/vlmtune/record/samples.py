"""Evaluated rows as a tracker shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


IMAGE_SIDE = 512  # pixels; larger images are scaled down before they are logged


@dataclass(frozen=True)
class Sample:
    """One evaluated row, to look at."""

    question: str
    reference: str
    prediction: str
    score: float
    """0 (wrong) to 1 (right)."""
    image: Image.Image | None = None


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """An RGB copy whose longer side is at most `side` pixels."""
    copy = image.convert("RGB")
    copy.thumbnail((side, side))
    return copy
