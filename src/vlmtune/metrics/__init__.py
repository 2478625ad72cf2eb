"""Scores of an answer against its references: 0 to 1, no model and no file needed."""

from vlmtune.metrics.registry import METRICS, Metric, resolve, score
from vlmtune.metrics.texts import anls, exact_match, relaxed_accuracy, relaxed_accuracy_lenient, rouge_l, token_f1
from vlmtune.metrics.vqa import vqa_accuracy, vqa_accuracy_lenient

__all__ = [
    "METRICS",
    "Metric",
    "anls",
    "exact_match",
    "relaxed_accuracy",
    "relaxed_accuracy_lenient",
    "resolve",
    "rouge_l",
    "score",
    "token_f1",
    "vqa_accuracy",
    "vqa_accuracy_lenient",
]
