"""A run's evaluations: validation rows before, during and after training, and test rows at the end."""

from __future__ import annotations

import logging
import time

from vlmtune.data.images import open_image
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.evaluation.evaluate import Evaluation, evaluate
from vlmtune.launch import session
from vlmtune.models import sharding
from vlmtune.record.samples import Sample
from vlmtune.training.journal import Journal
from vlmtune.training.setup import Setup
from vlmtune.training.stopping import Stopping

log = logging.getLogger("vlmtune")


class Scoring:
    """Evaluates the current model and logs the result."""

    def __init__(self, run: Setup, journal: Journal, stopping: Stopping):
        self.run, self.journal, self.stopping = run, journal, stopping

    @property
    def validates(self) -> bool:
        return "validation" in self.run.splits

    def measure_baseline(self) -> None:
        """Evaluate the untrained model, unless this is disabled, impossible or already done."""
        progress = self.journal.progress
        if self.run.config.trainer.eval_baseline and progress.step == 0 and self.validates:
            found = self.evaluate("before training")
            progress.baseline = {f"baseline/{name}": value for name, value in found.metrics.items()}

    def evaluate(self, title: str, split: str = "validation") -> Evaluation:
        """Score a split; log the means and some samples with their images.

        Raises `signals.EvaluationStopped` on a signal.
        """
        run, records = self.run, self.run.splits[split].records
        began = time.perf_counter()
        session.seed_step(run.config.trainer.seed, run.engine, self.journal.progress.step)
        with sharding.gathered(run.model, run.config.sharding):
            found = evaluate(
                run.model,
                run.encoder,
                records,
                run.config,
                run.engine,
                title=f"evaluating {title}",
                layout=run.loader.layout,
                stop=self.stopping.pending,
            )
        prefix = "eval" if split == "validation" else split
        self.journal.log({f"{prefix}/{name}": value for name, value in found.metrics.items()})
        self.journal.log({"time/eval_seconds": time.perf_counter() - began})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        log.info("%s, %d rows: %s", title, len(records), shown)
        if run.writes:
            self._show_samples(records, found)
        return found

    def _show_samples(self, records: Records, found: Evaluation) -> None:
        count = min(self.run.config.tracker.samples, len(records))
        if count:
            spread = [n * len(records) // count for n in range(count)]  # neighbours often show the same image
            samples = [self._sample(records[n], found, n) for n in spread]
            self.journal.tracker.samples(samples, self.journal.progress.step)

    def _sample(self, record: Record, found: Evaluation, index: int) -> Sample:
        config = self.run.config
        picture = open_image(record.images[0], config.data.max_image_pixels) if record.images else None
        score = found.scores[index][config.task.metrics[0]]
        return Sample(record.question, record.answers[0], found.predictions[index], score, picture)
