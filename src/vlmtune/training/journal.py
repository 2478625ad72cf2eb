"""What a run reports while it trains: metrics.jsonl, the tracker, the progress bar. Only the first process reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from vlmtune import display
from vlmtune.config.schema import plain
from vlmtune.data import bad_rows
from vlmtune.launch import signals
from vlmtune.models.parts import base_files, count
from vlmtune.record import environment, runfolder, tracking
from vlmtune.record.metrics_file import MetricsFile
from vlmtune.record.progress import Progress
from vlmtune.training.loop import StepReport
from vlmtune.training.setup import Setup

log = logging.getLogger("vlmtune")


class Journal:
    """A context manager around a run. If the run ends early, the tracker gets the reason too."""

    def __init__(self, run: Setup, progress: Progress):
        self.run, self.progress = run, progress
        self.began = time.perf_counter()
        self.tracker: tracking.Tracker = tracking.NoTracker()
        self.metrics_file: MetricsFile | None = None
        self.result: dict[str, Any] | None = None
        """What result.json holds, once it is written: the run ended so, whatever fails afterwards."""

    def __enter__(self) -> Journal:
        config, folder = self.run.config, self.run.folder
        if self.run.writes:
            self._describe()
            resumed = self.progress.step if config.resume else None
            self.metrics_file = MetricsFile(folder / "metrics.jsonl", resume_step=resumed)
            self.tracker = tracking.build(config.tracker, plain(config), folder, resumed=bool(config.resume))
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        stopped = isinstance(error, signals.EvaluationStopped | signals.Interrupted | KeyboardInterrupt)
        self.tracker.finish(self.result or {"status": "interrupted" if stopped else "failed"})
        if isinstance(error, signals.EvaluationStopped):  # before the first step: there is nothing to save yet
            raise signals.Interrupted(error.number) from None

    def _describe(self) -> None:
        """Write quarantine.csv and environment.json."""
        run, folder = self.run, self.run.folder
        if bad := [row for split in run.splits.values() for row in split.bad]:
            bad_rows.write_quarantine(folder / "quarantine.csv", bad)
            log.warning("skipped %d bad rows: %s", len(bad), folder / "quarantine.csv")
        described = environment.describe(run.config.trainer.seed, run.loader.fingerprint, run.processor)
        described |= {"image_fingerprint": run.loader.image_fingerprint, "changes": self.progress.changes}
        described["base_model"] = base_files(run.model, str(run.config.model.path))
        described["total_steps"] = run.loader.total_steps
        described["trainable_weights"] = sum(count(p) for p in run.model.parameters() if p.requires_grad)
        runfolder.write_json(folder / "environment.json", described)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show the steps in a progress bar inside the context; peak memory is counted anew from here."""
        environment.PEAK.end_startup()
        total = self.run.loader.total_steps
        with display.bar("training", total, done=self.progress.step, show=self.run.writes) as self.advance:
            yield

    def after_step(self, step: StepReport) -> None:
        """Advance the bar. Log every `trainer.log_every` steps, and the first and last step."""
        self.advance(1, note=self._note(step))
        if step.step % self.run.config.trainer.log_every and step.step not in (1, self.run.loader.total_steps):
            return
        self.log(
            {
                "train/loss": step.loss,
                "train/learning_rate": step.learning_rate,
                "train/gradient_norm": step.gradient_norm,
                "train/examples_per_second": step.examples / step.seconds,
                "train/tokens_per_second": step.tokens / step.seconds,
                "train/examples": self.progress.examples,
                "train/epoch": step.step / self.run.loader.order.steps_per_epoch,
                "train/padding_share": step.padding_share,
                "time/step_seconds": step.seconds,
                "time/data_wait_share": step.waited / step.seconds,
                "time/elapsed_seconds": time.perf_counter() - self.began,
            }
        )

    def _note(self, step: StepReport) -> str:
        memory = environment.peak_bytes(environment.memory()) or 0
        return (
            f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {step.examples / step.seconds:.0f} examples/s  "
            f"{display.size(step.tokens / step.seconds)} tokens/s  {display.size(memory, 'B')}"
        )

    def log(self, values: dict[str, float]) -> None:
        """Write to metrics.jsonl and the tracker, at the current step."""
        if self.metrics_file is not None:
            self.metrics_file.log(values, self.progress.step)
            self.tracker.log(values, self.progress.step)
