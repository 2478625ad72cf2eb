"""Which evaluation was best so far, and early stopping."""

from __future__ import annotations

import logging
import math

from vlmtune.evaluation.evaluate import Evaluation
from vlmtune.metrics import lower_is_better
from vlmtune.training.loop import StepReport
from vlmtune.training.saving import Saving
from vlmtune.training.scoring import Scoring

log = logging.getLogger("vlmtune")


class Best:
    """Evaluates between steps. With `trainer.best_metric`, saves the best model and counts towards early stopping."""

    def __init__(self, scoring: Scoring, saving: Saving):
        self.scoring, self.saving = scoring, saving
        self.run, self.trainer, self.progress = scoring.run, scoring.run.config.trainer, saving.progress

    @property
    def exhausted(self) -> bool:
        """Whether none of the last `trainer.early_stopping_patience` evaluations was better."""
        patience = self.trainer.early_stopping_patience
        return patience is not None and self.progress.since_best >= patience

    def after_step(self, step: StepReport) -> None:
        """Evaluate every `trainer.eval_every` steps. `finish` evaluates after the last step."""
        loader = self.run.loader
        due = step.step != loader.total_steps and loader.due(self.trainer.eval_every, step.step)
        if due and self.scoring.validates:
            with self.scoring.stopping.evaluating():
                self.evaluate()

    def evaluate(self) -> Evaluation:
        """Score the validation rows; save a checkpoint if the score is the best so far."""
        found, progress = self.scoring.evaluate(f"step {self.progress.step}"), self.progress
        if self.trainer.best_metric is None:
            return found
        name = self.trainer.best_metric.removeprefix("eval/")
        value = found.metrics[name]
        if not math.isfinite(value):
            log.warning("%s is %s at step %d, which is never the best", name, value, progress.step)
        elif progress.best is None or (value < progress.best if lower_is_better(name) else value > progress.best):
            progress.best, progress.best_step, progress.since_best = value, progress.step, 0
            self.saving.save()
            return found
        progress.since_best += 1
        if self.exhausted:
            count, best = self.trainer.early_stopping_patience, math.nan if progress.best is None else progress.best
            log.info("early stopping: %s has not improved on %.4f for %d evaluations", name, best, count)
        return found
