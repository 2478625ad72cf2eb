"""How well objects were located: overlap of boxes, and F1 of those that overlap by half.

A box is four numbers x1, y1, x2, y2, in whatever unit the references have: two opposite corners. It is read from JSON
(`[x1, y1, x2, y2]`, a list of such, or objects with `bbox_2d`, `bbox` or `box`), from `(x1,y1),(x2,y2)` of Qwen-VL,
from four `<loc0000>` of PaliGemma, whose order is y1, x1, y2, x2, or from any four numbers in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlmtune.metrics.corpus import ratio
from vlmtune.metrics.distance import best_pairs
from vlmtune.metrics.trees import read

Box = tuple[float, float, float, float]
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
LOCATED = re.compile(r"<loc(\d{4})>" * 4)
WRITTEN = re.compile(
    rf"\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)|[\[(<]+{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])>]"
)
KEYS = ("bbox_2d", "bbox", "box")
HALF = 0.5


def boxes(text: str) -> list[Box]:
    """The boxes that a text names, in order; none if it names none."""
    if located := LOCATED.findall(text):
        return [_box((x1, y1, x2, y2)) for y1, x1, y2, x2 in located]
    tree = read(text)
    if not isinstance(tree, str):
        return _of_tree(tree)
    return [_box([part for part in found if part]) for found in WRITTEN.findall(text)]


def _of_tree(tree: Any) -> list[Box]:
    if isinstance(tree, dict):
        own = next((tree[key] for key in KEYS if key in tree), list(tree.values()))
        return _of_tree(own)
    if not isinstance(tree, list):
        return []
    numbers = [each for each in tree if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(tree) == 4 and len(numbers) == 4:
        return [_box(numbers)]
    return [box for each in tree for box in _of_tree(each)]


def _box(numbers: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = map(float, numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def no_boxes(reference: str) -> str | None:
    """Why a reference can't be scored; None if it can."""
    empty = read(reference) == []  # nothing to find is an answer
    return None if empty or boxes(reference) else "names no box, such as [12, 30, 80, 95]"


def overlap(left: Box, right: Box) -> float:
    """Intersection over union.

    >>> overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    if left == right:
        return 1.0
    shared = max(width, 0.0) * max(height, 0.0)
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)) - shared
    return shared / whole if whole else 0.0


def box_iou(prediction: str, references: Sequence[str]) -> float:
    """Intersection over union of the boxes that fit together best, over the number of boxes on the longer side, so that
    a missing or surplus box counts 0; best over the references. For one box the usual IoU.
    """
    return max(_mean_overlap(boxes(prediction), boxes(reference)) for reference in references)


def _mean_overlap(found: list[Box], wanted: list[Box]) -> float:
    most = max(len(found), len(wanted))
    every = [[overlap(left, right) for right in wanted] for left in found]
    return sum(every[row][column] for row, column in best_pairs(every)) / most if most else 1.0


def _hits(prediction: str, reference: str) -> tuple[int, int]:
    found, wanted = boxes(prediction), boxes(reference)
    hits = [[float(overlap(left, right) >= HALF) for right in wanted] for left in found]
    return 2 * sum(int(hits[row][column]) for row, column in best_pairs(hits)), len(found) + len(wanted)


box_f1 = ratio(_hits)
"""Harmonic mean of precision and recall of all boxes of all rows: a box is found if it overlaps one of the reference's
by half (IoU >= 0.5), each paired once. With one box per row it is the accuracy at 0.5 that RefCOCO reports."""
