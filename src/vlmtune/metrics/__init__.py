"""Scores of an answer against its references: no model and no file needed.

From 0 to 1, but for CIDEr-D (to 10) and error rates, where 0 is best.
"""

from vlmtune.metrics.registry import (
    FITS,
    METRICS,
    PERFECT,
    Metric,
    averaged,
    lower_is_better,
    misfits,
    resolve,
    row_scores,
    score,
    value_of,
)
from vlmtune.metrics.texts import anls, exact_match, relaxed_accuracy, relaxed_accuracy_lenient, rouge_l, token_f1
from vlmtune.metrics.vqa import vqa_accuracy, vqa_accuracy_lenient

__all__ = [
    "FITS",
    "METRICS",
    "PERFECT",
    "Metric",
    "anls",
    "averaged",
    "exact_match",
    "lower_is_better",
    "misfits",
    "relaxed_accuracy",
    "relaxed_accuracy_lenient",
    "resolve",
    "rouge_l",
    "row_scores",
    "score",
    "token_f1",
    "value_of",
    "vqa_accuracy",
    "vqa_accuracy_lenient",
]
