"""Metrics whose value for many rows is not the mean of a function of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Texts = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Corpus:
    """A metric of rows together. Called like other metrics, it scores one row as if there were no other."""

    rows: Callable[[Texts, References], list[float]]
    """The score of each row."""
    total: Callable[[Texts, References], float] | None = None
    """The value of some rows together; None: the mean of their scores."""
    lower_is_better: bool = False
    row_by_row: bool = True
    """Whether a row's score does not depend on the other rows."""

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        return self.rows([prediction], [references])[0]

    def of(self, predictions: Texts, references: References, scores: Sequence[float]) -> float:
        """The value of at least one row; `scores`: the rows' own."""
        return sum(scores) / len(scores) if self.total is None else self.total(predictions, references)


@dataclass(frozen=True)
class Ratio:
    """A value that is one sum over all rows divided by another: a long row weighs more than a short one."""

    counts: Callable[[str, str], tuple[float, float]]
    """What a prediction and one reference add to the two sums."""
    lower_is_better: bool = False

    def best(self, prediction: str, references: Sequence[str]) -> tuple[float, float]:
        """The counts with the reference that gives the row its best score."""
        counts = [self.counts(prediction, reference) for reference in references]
        return (min if self.lower_is_better else max)(counts, key=self.share)

    def share(self, counts: tuple[float, float]) -> float:
        """Nothing of nothing is as good as can be; something of nothing counts whole."""
        top, bottom = counts
        perfect = 0.0 if self.lower_is_better else 1.0
        return top / bottom if bottom else (top or perfect)

    def rows(self, predictions: Texts, references: References) -> list[float]:
        return [self.share(self.best(*row)) for row in zip(predictions, references, strict=True)]

    def total(self, predictions: Texts, references: References) -> float:
        found = [self.best(*row) for row in zip(predictions, references, strict=True)]
        return self.share((sum(top for top, _ in found), sum(bottom for _, bottom in found)))


def ratio(counts: Callable[[str, str], tuple[float, float]], *, lower_is_better: bool = False) -> Corpus:
    """The metric of these counts."""
    made = Ratio(counts, lower_is_better)
    return Corpus(made.rows, made.total, lower_is_better)
