"""How much of a text was read wrongly: character and word error rate, for which lower is better."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from vlmtune.metrics.corpus import ratio
from vlmtune.metrics.distance import levenshtein


def _plain(text: str) -> str:
    """Case and punctuation count; runs of whitespace, line breaks too, are one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _character_errors(prediction: str, reference: str) -> tuple[int, int]:
    return _errors(_plain(prediction), _plain(reference))


def _word_errors(prediction: str, reference: str) -> tuple[int, int]:
    return _errors(_plain(prediction).split(), _plain(reference).split())


def _errors(prediction: Sequence[str], reference: Sequence[str]) -> tuple[int, int]:
    return levenshtein(prediction, reference), len(reference)


cer = ratio(_character_errors, lower_is_better=True)
"""Edits of characters divided by the characters of the references, over all rows; above 1 where a model goes on and on.
As the package jiwer counts them in texts with single spaces."""
wer = ratio(_word_errors, lower_is_better=True)
"""The same of words, which are what is between spaces."""
