"""Scores of a model on the rows of `data.test`, with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import Config
from vlmtune.data.splits import Records

if TYPE_CHECKING:
    from vlmtune.launch.engine import Engine
    from vlmtune.prompt.encode import Encoder

DRAWS, CONFIDENCE = 10_000, 0.95


@dataclass(frozen=True)
class Scored:
    """What a model scores."""

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % BCa intervals of the task's metrics; the loss has none."""
    predictions: Sequence[str] = ()

    def cells(self) -> list[str]:
        """The name, then each metric with its interval."""
        return [self.name, *(self._cell(metric) for metric in self.metrics)]

    def _cell(self, metric: str) -> str:
        ends = self.intervals.get(metric)
        return f"{self.metrics[metric]:.4f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def score(name: str, model: Any, encoder: Encoder, records: Records, config: Config, engine: Engine) -> Scored:
    """Have `model` answer all `records`."""
    from vlmtune.evaluation.evaluate import evaluate

    found = evaluate(model, encoder, records, config, engine, title=f"evaluating {name}")
    return Scored(name, found.metrics, intervals(found.scores, records), found.predictions)


def intervals(scores: Sequence[dict[str, float]], records: Records) -> dict[str, tuple[float, float]]:
    """Intervals of each metric's mean. Rows about one image are not independent, so images are drawn."""
    import numpy as np

    from vlmtune.metrics import statistics

    names = [*scores[0]]
    values = np.array([[row[name] for name in names] for row in scores])
    groups = [row if (group := records[row].group) is None else group for row in range(len(scores))]
    sums, counts = statistics.per_image(values, groups)
    drawn = statistics.bootstrap(sums, counts, np.random.default_rng(0), DRAWS)
    return {name: statistics.interval(drawn[:, at], sums[:, at], counts, CONFIDENCE) for at, name in enumerate(names)}


def table(title: str, found: Sequence[Scored]) -> str:
    """One line for each model."""
    from vlmtune import display

    return display.table(title, ("model", *found[0].metrics), [scored.cells() for scored in found])
