"""Scores of a model on the rows of `data.test`, with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import Config
from vlmtune.data.splits import Records, images_of
from vlmtune.metrics import averaged
from vlmtune.metrics.statistics import mean_intervals

if TYPE_CHECKING:
    from vlmtune.launch.engine import Engine
    from vlmtune.prompt.encode import Encoder


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scored:
    """What a model scores."""

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """BCa intervals of the task's metrics that are means over rows."""
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
    intervals = mean_intervals(found.scores, averaged(config.task.metrics), images_of(records), CONFIDENCE)
    return Scored(name, found.metrics, intervals, found.predictions)


def table(title: str, found: Sequence[Scored]) -> str:
    """One line for each model."""
    from vlmtune import display

    return display.table(title, ("model", *found[0].metrics), [scored.cells() for scored in found])
