"""A run's checkpoints: which one it resumes from, when one is written, and which one was best."""

from __future__ import annotations

import logging

from vlmtune.data import fingerprint
from vlmtune.errors import CheckpointError
from vlmtune.launch import session
from vlmtune.models.parts import base_of
from vlmtune.models.sharding import is_sharded
from vlmtune.record import runfolder
from vlmtune.record.progress import Progress
from vlmtune.training import checkpoint, resume
from vlmtune.training.loop import StepReport
from vlmtune.training.setup import Setup
from vlmtune.training.stopping import Stopping

log = logging.getLogger("vlmtune")


class Saving:
    """Reads and writes the checkpoints of a run. `progress` is how far the run has come."""

    def __init__(self, run: Setup, stopping: Stopping):
        self.run, self.stopping = run, stopping
        commit = getattr(base_of(run.model).config, "_commit_hash", None)
        files = fingerprint.model_files(str(run.config.model.path), commit)
        self.identity = resume.identity(run.config, run.loader, run.engine, files)
        self.progress = self._resumed() if run.config.resume else Progress()

    def _resumed(self) -> Progress:
        """Restore the newest checkpoint; returns its progress."""
        run, engine = self.run, self.run.engine
        found = session.decided_by_first(lambda: checkpoint.newest(run.folder), engine)
        progress = checkpoint.load_checkpoint(found, run.model, run.optimizer, engine.scaler, self.identity)
        run.scheduler.go_to(progress.step)
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

    def save(self) -> None:
        """Write a checkpoint. Every process must call this."""
        run = self.run
        if run.writes or is_sharded(run.model):
            path = checkpoint.save_checkpoint(
                run.folder / "checkpoints",
                run.model,
                run.optimizer,
                run.engine.scaler,
                self.progress,
                self.identity,
                keep=run.config.trainer.keep_checkpoints,
                writes=run.writes,
            )
            log.info("saved %s", path)
        run.engine.wait_for_everyone()

    def restore_best(self) -> bool:
        """Load the weights of the best checkpoint. Returns False if the current weights are the best."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return False
        chosen = self.run.folder / "checkpoints" / f"step_{best:06d}"
        try:
            session.decided_by_first(lambda: checkpoint.check(chosen), self.run.engine)
        except CheckpointError as error:
            log.warning("can't use the best checkpoint, so the final model is that of the last step: %s", error)
            return False
        checkpoint.load_weights(chosen, self.run.model)
        log.info("loaded the weights of step %d, where %s was best", best, self.run.config.trainer.best_metric)
        return True
