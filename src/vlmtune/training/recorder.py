"""What happens around the loop's steps: logging, evaluation, checkpoints, early stopping, and the result at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmtune import display
from vlmtune.batching.loader import Batches
from vlmtune.config.schema import Config, plain
from vlmtune.data import fingerprint, table
from vlmtune.data.images import open_image
from vlmtune.data.records import Record, Split
from vlmtune.errors import CheckpointError, TrainingError
from vlmtune.evaluation.evaluate import Evaluation, evaluate
from vlmtune.launch import session, signals
from vlmtune.models import adapters
from vlmtune.models.parts import base_of
from vlmtune.prompt.encode import Encoder
from vlmtune.record import environment, report, runfolder, tracking
from vlmtune.record.progress import Progress
from vlmtune.training import checkpoint, resume
from vlmtune.training.loop import Hooks, NonFinite, StepReport

log = logging.getLogger("vlmtune")


class Recorder:
    """One run's folder and memory. On ranks other than the first it computes along and writes nothing."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        engine: Any,
        model: Any,
        encoder: Encoder,
        splits: dict[str, Split],
        batches: Batches,
    ):
        self.config, self.folder, self.engine = config, folder, engine
        self.model, self.encoder, self.splits, self.batches = model, encoder, splits, batches
        self.main = engine.is_main_process
        self.progress = Progress()
        self.interruption = signals.Wish()
        self.stopped_early = False
        self.ended_by: int | None = None
        self.started = time.perf_counter()
        self.tracker: tracking.Tracker = tracking.Nothing()
        self.metrics_file: tracking.MetricsFile | None = None

    # ---- before the first step

    def open(self, optimizer: Any, scheduler: Any, processor: Any) -> Progress:
        """Write what describes the run, start the trackers, and go on from a checkpoint if the config says so."""
        self.optimizer, self.scheduler, self.processor = optimizer, scheduler, processor
        commit = getattr(base_of(self.model).config, "_commit_hash", None)
        files = fingerprint.model_files(str(self.config.model.path), commit)
        self.identity = resume.identity(self.config, self.batches, self.engine, files)
        if self.config.resume:
            self._resume()
        if self.main:
            bad = [row for split in self.splits.values() for row in split.bad]
            if bad:
                table.write_quarantine(self.folder / "quarantine.csv", bad)
                log.warning("left out %d rows: %s", len(bad), self.folder / "quarantine.csv")
            described = environment.describe(self.config.trainer.seed, self.batches.fingerprint, processor)
            described |= {"image_fingerprint": self.batches.image_fingerprint, "changes": self.progress.changes}
            runfolder.write_json(self.folder / "environment.json", described)
            self.metrics_file = tracking.MetricsFile(
                self.folder / "metrics.jsonl", resume_step=self.progress.step if self.config.resume else None
            )
            resumed = bool(self.config.resume)
            self.tracker = tracking.build(self.config.tracker, plain(self.config), self.folder, resumed=resumed)
        return self.progress

    def _resume(self) -> None:
        found = session.decided_by_first(lambda: checkpoint.newest(self.folder), self.engine)
        self.progress = checkpoint.load_checkpoint(
            found, self.model, self.optimizer, self.engine.scaler, self.identity, self.engine.process_index
        )
        self.scheduler.go_to(self.progress.step)
        patience = self.config.trainer.early_stopping_patience
        self.stopped_early = patience is not None and self.progress.since_best >= patience
        if self.main:  # from here on the folder is this run's
            checkpoint.set_aside(found)
            runfolder.write_config(self.folder / "config.yaml", self.config)
            (self.folder / "result.json").unlink(missing_ok=True)
        log.info("resuming from step %d (%s)", self.progress.step, found)

    def measure_baseline(self) -> None:
        """Evaluate the untrained model, unless that is switched off, impossible or already done."""
        if self.config.trainer.eval_baseline and self.progress.step == 0 and "validation" in self.splits:
            found = self.evaluate("before training")
            self.progress.baseline = {f"baseline/{name}": value for name, value in found.metrics.items()}

    # ---- around steps

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, a signal is noted and ends the run at the next good place; whatever ends it early is a failure
        in the tracker too.
        """
        try:
            with self.interruption.watching():
                yield
        except signals.Ended as ended:  # in the evaluation before the first step: there is nothing to save yet
            self.tracker.finish({"status": "interrupted"})
            raise signals.Interrupted(ended.number) from None
        except BaseException as error:
            stopped = isinstance(error, signals.Interrupted | KeyboardInterrupt)
            self.tracker.finish({"status": "interrupted" if stopped else "failed"})
            raise

    @contextmanager
    def training(self) -> Iterator[None]:
        """While inside: a progress bar and clear errors."""
        total = self.batches.total_steps
        try:
            with display.bar("training", total, done=self.progress.step, show=self.main) as self.advance:
                yield
        except NonFinite as error:
            raise TrainingError(
                f"{error}. A lower trainer.learning_rate, trainer.precision=fp32 or trainer.max_grad_norm=1 may help; "
                "trainer.nonfinite=skip leaves such steps out"
            ) from error

    def hooks(self) -> Hooks:
        return Hooks(
            after_step=self.after_step,
            before_zero_grad=lambda step: adapters.after_step(self.model, step),
            penalty=lambda: adapters.penalty(self.model),
            stop=self.should_stop,
        )

    def after_step(self, step: StepReport) -> None:
        """Log, evaluate and save when it is time to."""
        trainer = self.config.trainer
        speed = {"examples": step.examples / step.seconds, "tokens": step.tokens / step.seconds}
        self.advance(1, note=self._note(step, speed))
        if step.step % trainer.log_every == 0 or step.step in (1, self.batches.total_steps):
            self.log(
                {
                    "train/loss": step.loss,
                    "train/learning_rate": step.learning_rate,
                    "train/gradient_norm": step.gradient_norm,
                    "train/examples_per_second": speed["examples"],
                    "train/tokens_per_second": speed["tokens"],
                    "train/examples": self.progress.examples,
                    "train/epoch": step.step / self.batches.order.steps_per_epoch,
                    "train/padding_share": step.padding_share,
                    "time/step_seconds": step.seconds,
                    "time/data_wait_share": step.waited / step.seconds,
                    "time/elapsed_seconds": time.perf_counter() - self.started,
                }
            )
        last = step.step == self.batches.total_steps
        if self._due(trainer.eval_every, step.step) and not last and "validation" in self.splits:
            try:
                self._evaluate_and_choose()
            except signals.Ended:  # `should_stop` knows, and `finish` saves
                return
        if self._due(trainer.save_every, step.step) and not last:
            self.save()

    def _note(self, step: StepReport, speed: dict[str, float]) -> str:
        used = environment.memory()
        memory = used["peak_device_bytes"] or used["peak_rss_bytes"]
        return (
            f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {speed['examples']:.0f} examples/s  "
            f"{display.size(speed['tokens'])} tokens/s  {display.size(memory, 'B')}"
        )

    def _due(self, every: Any, step: int) -> bool:
        if every is None:
            return False
        return self.batches.order.ends_epoch(step) if every == "epoch" else step % every == 0

    def should_stop(self) -> bool:
        """Whether to end after this step, the same answer on every rank."""
        own = self.interruption.signal
        if self.engine.num_processes > 1:  # a signal may reach some ranks alone
            wishes = torch.tensor([float(own == number) for number in signals.SIGNALS], device=self.engine.device)
            reached = self.engine.reduce(wishes, "sum").tolist()
            own = next((number for number, count in zip(signals.SIGNALS, reached, strict=True) if count), None)
        self.ended_by = own
        return own is not None or self.stopped_early

    def log(self, values: dict[str, float]) -> None:
        """Write to metrics.jsonl and the tracker, at the present step."""
        if self.metrics_file is not None:
            self.metrics_file.log(values, self.progress.step)
            self.tracker.log(values, self.progress.step)

    def evaluate(self, title: str, split: str = "validation") -> Evaluation:
        """Score a split; log the means and some samples with their images."""
        records = self.splits[split].records
        began = time.perf_counter()
        found = evaluate(
            self.model,
            self.encoder,
            records,
            self.config,
            self.engine,
            title=f"evaluating {title}",
            share=self.batches.share,
            share_answers=self.batches.share_answers,
            stop=lambda: self.interruption.signal,
        )
        prefix = "eval" if split == "validation" else split
        self.log({f"{prefix}/{name}": value for name, value in found.metrics.items()})
        self.log({"time/eval_seconds": time.perf_counter() - began})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        log.info("%s, %d rows: %s", title, len(records), shown)
        count = min(self.config.tracker.samples, len(records))
        if self.main and count:
            spread = [i * len(records) // count for i in range(count)]  # neighbours often show the same image
            self.tracker.samples([self._sample(records[i], found, i) for i in spread], self.progress.step)
        return found

    def _sample(self, record: Record, found: Evaluation, index: int) -> tracking.Sample:
        picture = open_image(record.images[0], self.config.data.max_image_pixels) if record.images else None
        first = self.config.task.metrics[0]
        score = found.scores[index][first]
        return tracking.Sample(record.question, record.answers[0], found.predictions[index], score, picture)

    def _evaluate_and_choose(self) -> Evaluation:
        """Evaluate; save where the metric that chooses is better than ever; stop where it has not been for long."""
        found, trainer = self.evaluate(f"step {self.progress.step}"), self.config.trainer
        if trainer.best_metric is None:
            return found
        name = trainer.best_metric.removeprefix("eval/")
        value, progress = found.metrics[name], self.progress
        if progress.best is None or (value < progress.best if name == "loss" else value > progress.best):
            progress.best, progress.best_step, progress.since_best = value, progress.step, 0
            self.save()
        else:
            progress.since_best += 1
            patience = trainer.early_stopping_patience
            if patience and progress.since_best >= patience:
                self.stopped_early = True
                log.info("%s has not been better than %.4f for %d evaluations: stopping", name, progress.best, patience)
        return found

    def save(self) -> None:
        """Write a checkpoint."""
        from accelerate.utils import gather_object

        states = (
            gather_object([checkpoint.random_state()]) if self.engine.num_processes > 1 else [checkpoint.random_state()]
        )
        if self.main:
            path = checkpoint.save_checkpoint(
                self.folder / "checkpoints",
                self.model,
                self.optimizer,
                self.engine.scaler,
                self.progress,
                self.identity,
                states,
                keep=self.config.trainer.keep_checkpoints,
            )
            log.info("saved %s", path)
        self.engine.wait_for_everyone()

    # ---- after the last step

    def finish(self) -> dict[str, Any]:
        """Choose and save the model, evaluate it, write result.json, predictions.csv and report.html.

        Returns the result. A signal ends an evaluation at its next batch: the run then saves where it is, to be gone on
        with, and evaluates no more. Once the last evaluation is done the result stands, whatever fails behind it.
        """
        final = self._choose()
        if self.main:  # before anything else can fail
            checkpoint.save_model(self.model, self.processor, self.folder / "model", self.config.model)
        metrics, final = self._score(final)
        status = "completed" if self.ended_by is None else "interrupted"
        result = runfolder.make_result(status, self.progress, metrics, self.config.task.metrics[0])
        if self.ended_by is not None:
            result["signal"] = self.ended_by
        if self.main:
            self._write(result, final)
        return result

    def _choose(self) -> Evaluation | None:
        """Put the weights to save into the model, and a checkpoint on disk where one is due; returns their evaluation
        if there was one."""
        final = None
        if self.ended_by is None and self.config.trainer.best_metric and not self.stopped_early:
            with self._ending():
                final = self._evaluate_and_choose()
        if self.ended_by is not None or self.config.trainer.save_every:
            self.save()
        return None if self.ended_by is None and self._restore_best() else final

    def _score(self, final: Evaluation | None) -> tuple[dict[str, float], Evaluation | None]:
        """The metrics of result.json, and the evaluation of the validation rows; less of both where a signal comes."""
        metrics = dict(self.progress.baseline)
        if self.ended_by is not None:
            return metrics, None
        with self._ending():
            if "validation" in self.splits:
                final = final or self.evaluate("after training")
                metrics |= {f"eval/{name}": value for name, value in final.metrics.items()}
            if "test" in self.splits:
                tested = self.evaluate("on the test rows", "test")
                metrics |= {f"test/{name}": value for name, value in tested.metrics.items()}
        if self.ended_by is not None and not self.config.trainer.save_every and not self.config.trainer.best_metric:
            self.save()  # for `resume=` to evaluate
        return metrics, final

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """A signal ends what is inside, and the run with it."""
        try:
            yield
        except signals.Ended as ended:
            self.ended_by = ended.number

    def _write(self, result: dict[str, Any], final: Evaluation | None) -> None:
        runfolder.write_json(self.folder / "result.json", result)
        with self._standing("predictions.csv"):
            if final is not None:
                predictions = self.folder / "predictions.csv"
                runfolder.write_predictions(predictions, self.splits["validation"], final, self.config.task.metrics[0])
        with self._standing("the tracker's result"):
            self.tracker.finish(result)
        with self._standing("report.html"):
            report.write(self.folder, self._image, self._texts)
        if self.encoder.image_cache is not None:
            log.info(self.encoder.image_cache.report())
        log.info(runfolder.closing_table(self.folder, result))

    @contextmanager
    def _standing(self, what: str) -> Iterator[None]:
        """A failure inside costs `what` and a warning: the result is written and stands."""
        try:
            yield
        except Exception as error:
            log.warning("%s could not be written, the result stands: %s: %s", what, type(error).__name__, error)

    def _restore_best(self) -> bool:
        """Take the weights of the checkpoint that was best; False where those are the present ones."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return False
        chosen = self.folder / "checkpoints" / f"step_{best:06d}"
        try:
            session.decided_by_first(lambda: checkpoint.check(chosen), self.engine)
        except CheckpointError as error:
            log.warning("the best checkpoint can't be used, so the model is that of the last step: %s", error)
            return False
        checkpoint.load_weights(chosen, self.model)
        log.info("took the weights of step %d, where %s was best", best, self.config.trainer.best_metric)
        return True

    def _texts(self, row: int) -> tuple[str, str]:
        record = self.splits["validation"].records[row]
        return record.question, record.answers[0]

    def _image(self, row: int) -> Any:
        record = self.splits["validation"].records[row]
        return open_image(record.images[0], self.config.data.max_image_pixels) if record.images else None
