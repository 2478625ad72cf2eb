"""How well a JSON object was extracted: ANLS* and the F1 of its fields."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vlmtune.metrics.corpus import ratio
from vlmtune.metrics.distance import best_pairs, levenshtein
from vlmtune.metrics.texts import normalise

FENCED = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
MISSING = object()
EMPTY: tuple[Any, ...] = (None, {}, [], "")


def read(text: str) -> Any:
    """The value of a JSON text, in a code fence or not; any other text is itself."""
    fenced = FENCED.match(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return text


def no_object(reference: str) -> str | None:
    """Why a reference can't be scored by fields; None if it can."""
    return None if isinstance(read(reference), dict | list) else "is no JSON object or list"


# ---------------------------------------------------------------- ANLS*


def anls_star(prediction: str, references: Sequence[str]) -> float:
    """ANLS*: the normalised Levenshtein similarity of each value in a JSON text, 0 below one half, divided by the
    number of values, missing and surplus ones included; best over the references.

    Entries of lists are paired so that they fit best, objects by their keys. Texts without JSON are compared as one
    value. Equal to the package anls-star, given the parsed texts, but where several pairings of a list fit
    equally well. Source: Peer et al. 2024, arXiv:2402.03848.
    """
    found = read(prediction)
    return max(_share(_compared(read(reference), found)) for reference in references)


def _share(counts: tuple[float, int]) -> float:
    return counts[0] / counts[1] if counts[1] else 1.0


def _compared(wanted: Any, found: Any) -> tuple[float, int]:
    """The sum of the values' similarities, and their number on the larger side."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        pairs = [(wanted.get(key), found.get(key), key in wanted) for key in {**wanted, **found}]
        parts = [_compared(left, right) for left, right, _ in pairs]
        counted = [part[0] for part, (_, right, own) in zip(parts, pairs, strict=True) if own or not _empty(right)]
        return sum(counted), sum(part[1] for part in parts)
    if isinstance(wanted, list) and isinstance(found, list):
        return _paired(wanted, found)
    length = max(_values(wanted), _values(found))
    if wanted is None:
        return float(_empty(found)), length
    if isinstance(wanted, dict | list) or isinstance(found, dict | list) or found is None:
        return 0.0, length
    return _similarity(str(wanted), str(found)), length


def _paired(wanted: list[Any], found: list[Any]) -> tuple[float, int]:
    every = [[_compared(left, right) for right in found] for left in wanted]
    gains = [
        [_share(part) + (left == right) * 1e-12 for part, right in zip(row, found, strict=True)]  # equal ones first
        for row, left in zip(every, wanted, strict=True)
    ]
    pairs = best_pairs(gains)
    rows, columns = {row for row, _ in pairs}, {column for _, column in pairs}
    length = sum(every[row][column][1] for row, column in pairs)
    length += sum(_values(value) for at, value in enumerate(wanted) if at not in rows)
    length += sum(_values(value) for at, value in enumerate(found) if at not in columns)
    return sum(every[row][column][0] for row, column in pairs), length


def _values(tree: Any) -> int:
    if isinstance(tree, dict | list):
        return sum(map(_values, tree.values() if isinstance(tree, dict) else tree))
    return 1


def _empty(value: Any) -> bool:
    return any(value is each or (type(value) is type(each) and value == each) for each in EMPTY)


def _similarity(left: str, right: str) -> float:
    left, right = (" ".join(text.lower().split()) for text in (left, right))
    longer = max(len(left), len(right))
    similarity = 1 - levenshtein(left, right) / longer if longer else 1.0
    return similarity if similarity >= 0.5 else 0.0


# ---------------------------------------------------------------- F1 of fields


def _fields(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each value with the keys that lead to it; the places in lists don't count."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _fields(value, (*path, str(key)))
    elif isinstance(tree, list):
        for value in tree:
            yield from _fields(value, path)
    elif tree is not None:
        yield path, normalise(str(tree))


def _shared_fields(prediction: str, reference: str) -> tuple[int, int]:
    """Twice the fields that both have with an equal value, and the fields of both."""
    found, wanted = (Counter(_fields(read(text))) for text in (prediction, reference))
    return 2 * (found & wanted).total(), found.total() + wanted.total()


field_f1 = ratio(_shared_fields)
"""Harmonic mean of precision and recall of all fields of all rows, as in Donut (Kim et al. 2022, arXiv:2111.15664): a
field is right if its keys and its value, compared as `exact_match` does, are."""
