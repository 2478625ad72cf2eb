"""After the last step: choose and save the model, evaluate it, then write everything else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlmtune.data.images import open_image
from vlmtune.data.splits import images_of
from vlmtune.evaluation.evaluate import Evaluation
from vlmtune.launch import session
from vlmtune.metrics import averaged
from vlmtune.metrics.statistics import mean_intervals
from vlmtune.prompt.image_cache import PixelStore
from vlmtune.record import card, environment, report, runfolder, slices
from vlmtune.training.best import Best
from vlmtune.training.journal import Journal
from vlmtune.training.model_folder import save_model, whole_state
from vlmtune.training.setup import Setup

log = logging.getLogger("vlmtune")


@dataclass
class Finish:
    """Ends a run after its last step or a signal."""

    run: Setup
    journal: Journal
    best: Best

    def __post_init__(self) -> None:
        self.scoring, self.saving = self.best.scoring, self.best.saving
        self.stopping = self.scoring.stopping
        self.slices: dict[str, slices.Slices] = {}

    def __call__(self) -> dict[str, Any]:
        """Choose and save the model, evaluate it, write result.json, predictions.csv and report.html.

        Returns the result. A signal stops an evaluation after the current batch: the run then saves a checkpoint to
        resume from and skips further evaluations. Once the last evaluation is done the result is final, whatever
        fails afterwards.
        """
        run = self.run
        final = self._choose()
        self.saving.check_weights()
        state = whole_state(run.model)
        if run.writes:  # before anything else can fail
            save_model(run.model, run.processor, run.folder / "model", run.config.model, state)
        del state
        try:
            metrics, final = self._score(final)
        except Exception:
            if run.engine.num_processes == 1:  # else the others can't help to save
                with _optional("a checkpoint to evaluate from"):
                    self._save_for_resume()
            raise
        status = "completed" if self.stopping.signal is None else "interrupted"
        memory = session.most_of_ranks(environment.memory(), run.engine)
        result = runfolder.make_result(status, self.saving.progress, metrics, run.config.task.metrics[0], memory)
        if self.slices:
            result["slices"] = self.slices
        if self.stopping.signal is not None:
            result["signal"] = self.stopping.signal
        if run.writes:
            self._write(result, final)
        return result

    def _choose(self) -> Evaluation | None:
        """Load the weights to save into the model, and write a checkpoint if one is due.

        Returns the evaluation of these weights, or None if there was none.
        """
        final, trainer = None, self.run.config.trainer
        if self.stopping.signal is None and trainer.best_metric and not self.best.exhausted:
            with self.stopping.evaluating():
                final = self.best.evaluate()
        if self.stopping.signal is not None or trainer.save_every:
            self.saving.save()
            self.saving.wait()
        return None if self.stopping.signal is None and self.saving.restore_best() else final

    def _score(self, final: Evaluation | None) -> tuple[dict[str, float], Evaluation | None]:
        """The metrics for result.json, and the evaluation of the validation rows. Incomplete if a signal arrives."""
        metrics = dict(self.saving.progress.baseline)
        if self.stopping.signal is not None:
            return metrics, None
        with self.stopping.evaluating():
            if self.scoring.validates:
                final = final or self.scoring.evaluate("after training")
                metrics |= {f"eval/{name}": value for name, value in final.metrics.items()}
                self._slice("validation", "eval", final)
            if "test" in self.run.splits:
                tested = self.scoring.evaluate("on the test rows", "test")
                metrics |= {f"test/{name}": value for name, value in tested.metrics.items()}
                self._slice("test", "test", tested)
        if self.stopping.signal is not None:
            self._save_for_resume()
        return metrics, final

    def _slice(self, split: str, prefix: str, found: Evaluation) -> None:
        if self.run.config.task.slices and self.run.writes:
            self.slices[prefix] = slices.sliced(self.run.splits[split], found, self.run.config)
            log.info("%s rows\n%s", split, "\n".join(slices.tables(self.slices[prefix])))

    def _save_for_resume(self) -> None:
        """Save what `resume=` needs to evaluate, where `_choose` has not."""
        trainer = self.run.config.trainer
        if not trainer.save_every and not trainer.best_metric:
            self.saving.save()
            self.saving.wait()

    def _write(self, result: dict[str, Any], final: Evaluation | None) -> None:
        """result.json comes last of the files: a run that is killed before that is gone on with, and has them all."""
        run, folder = self.run, self.run.folder
        try:
            with _optional("predictions.csv"):
                if final is not None:
                    rows, metrics = run.splits["validation"], run.config.task.metrics
                    runfolder.write_predictions(folder / "predictions.csv", rows, final, metrics)
            with _optional("model/README.md"):
                sizes = {name: len(split) for name, split in run.splits.items()}
                card.write(folder, run.config, result, sizes, self._intervals(final))
            with _optional("report.html"):
                report.write(folder, result, self._image, self._texts)
        finally:  # also where a second signal ends the report
            runfolder.write_json(folder / "result.json", result)
            self.journal.result = result
        with _optional("the tracker's result"):
            self.journal.tracker.finish(result)
        with _optional("the closing lines"):
            if isinstance(cache := run.encoder.image_cache, PixelStore):
                log.info(cache.report())
            log.info(runfolder.closing_table(folder, result))

    def _intervals(self, final: Evaluation | None) -> dict[str, tuple[float, float]]:
        if final is None:
            return {}
        names = averaged(self.run.config.task.metrics)
        return mean_intervals(final.scores, names, images_of(self.run.splits["validation"].records))

    def _texts(self, row: int) -> tuple[str, str]:
        record = self.run.splits["validation"].records[row]
        return record.question, record.answers[0]

    def _image(self, row: int) -> Any:
        record = self.run.splits["validation"].records[row]
        return open_image(record.images[0], self.run.config.data.max_image_pixels) if record.images else None


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Turn a failure inside the context into a warning that `what` is missing: the result itself is written anyway."""
    try:
        yield
    except Exception as error:
        log.warning("could not write %s; the result is not affected: %s: %s", what, type(error).__name__, error)
