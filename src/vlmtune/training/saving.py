"""A run's checkpoints: which one it resumes from, when one is written, and which one was best."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from vlmtune.errors import CheckpointError, NonFinite
from vlmtune.launch import session
from vlmtune.models.parts import base_files
from vlmtune.models.sharding import is_sharded
from vlmtune.record import runfolder
from vlmtune.record.progress import Progress
from vlmtune.training import agreement, checkpoint, resume, snapshot
from vlmtune.training.loop import StepReport
from vlmtune.training.setup import Setup
from vlmtune.training.snapshot import Snapshot
from vlmtune.training.stopping import Stopping

log = logging.getLogger("vlmtune")


class Saving:
    """Reads and writes the checkpoints of a run. `progress` is how far the run has come.

    A context manager: training goes on while a thread writes, at most one checkpoint at a time, and the context is left
    once it is written.
    """

    def __init__(self, run: Setup, stopping: Stopping):
        self.run, self.stopping = run, stopping
        files = base_files(run.model, str(run.config.model.path))
        self.identity = resume.identity(run.config, run.loader, run.engine, files)
        agreement.compare({**self.identity, "config": None}, run.engine)  # compared by `build`
        self.progress = self._resumed() if run.config.resume else Progress(first_total=run.loader.total_steps)
        self.saved: Progress | None = None
        """Of the last checkpoint that this process began to write."""
        self.writer, self.writing = ThreadPoolExecutor(1, "checkpoints"), Future[None]()
        self.writing.set_result(None)

    def __enter__(self) -> Saving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.shutdown()  # after the write under way
        if error is None:
            self.wait()
        elif (failure := self.writing.exception()) not in (None, error):
            log.warning("the last checkpoint was not written: %s", failure)

    def _resumed(self) -> Progress:
        """Restore the newest checkpoint; returns its progress."""
        run, engine = self.run, self.run.engine
        found = session.decided_by_first(lambda: checkpoint.newest(run.folder), engine)
        progress = checkpoint.load_checkpoint(found, run.model, run.optimizer, engine.scaler, self.identity)
        run.scheduler.resume(progress.step, progress.first_total or run.loader.total_steps)
        if run.writes:  # from here on the folder is this run's
            checkpoint.set_aside(found)
            runfolder.write_config(run.folder / "config.yaml", run.config)
            (run.folder / "result.json").unlink(missing_ok=True)
        log.info("resuming from step %d (%s)", progress.step, found)
        return progress

    def after_step(self, step: StepReport) -> None:
        """Write a checkpoint every `trainer.save_every` steps. `finish` writes the one after the last step."""
        loader = self.run.loader
        due = step.step != loader.total_steps and loader.due(self.run.config.trainer.save_every, step.step)
        if due and self.stopping.signal is None:
            self.save()

    def check_weights(self) -> None:
        """Raise NonFinite if a trained weight is NaN or infinite: it can't train on, and is never saved."""
        bad = snapshot.not_finite(self.run.model)
        if not session.all_ranks(bad is None, self.run.engine):
            raise NonFinite(
                f"a weight is NaN or infinite after step {self.progress.step} ({bad or 'on another process'}), so this "
                f"state is not saved; resume={self.run.folder} goes on from the newest checkpoint, for instance with a "
                "lower trainer.learning_rate"
            )

    def save(self) -> None:
        """Begin to write a checkpoint, unless this very state is being written. Returns once the state is copied.

        Every process must call this. Raises NonFinite, as `check_weights` does, and what kept the checkpoint before
        from being written, which is waited for.
        """
        if self.saved == self.progress:  # the best one was saved after this step
            return
        run = self.run
        self.check_weights()
        self.wait()
        self.saved = copy.deepcopy(self.progress)
        if run.writes:
            state = (run.model, run.optimizer, run.engine.scaler, self.progress, self.identity)
            self.writing = self.writer.submit(self._write, snapshot.take(*state))
        elif is_sharded(run.model):
            snapshot.contribute(run.model, run.optimizer)

    def _write(self, taken: Snapshot) -> None:
        trainer = self.run.config.trainer
        path = checkpoint.write(self.run.folder / "checkpoints", taken, keep=trainer.keep_checkpoints)
        log.info("saved %s", path)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises what kept it from being written."""
        self.writing.result()

    def restore_best(self) -> bool:
        """Load the weights of the best checkpoint. Returns False if the current weights are the best."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return False
        self.wait()
        chosen = self.run.folder / "checkpoints" / f"step_{best:06d}"
        try:
            session.decided_by_first(lambda: checkpoint.check(chosen), self.run.engine)
        except CheckpointError as error:
            log.warning("can't use the best checkpoint, so the final model is that of the last step: %s", error)
            return False
        checkpoint.load_weights(chosen, self.run.model)
        log.info("loaded the weights of step %d, where %s was best", best, self.run.config.trainer.best_metric)
        return True
