"""A run's steps, and what follows one that fails: it begins again in smaller micro-batches, or what was reached before
it is saved.

Both need weights, optimizer and progress as they were before the step. They are, unless the optimizer was at work, or
what follows a step (logs, evaluation, a checkpoint) was not complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vlmtune.errors import NonFinite
from vlmtune.launch import session
from vlmtune.memory import is_out_of_memory, note
from vlmtune.record.progress import Progress
from vlmtune.training import loop
from vlmtune.training.loop import Hooks
from vlmtune.training.saving import Saving
from vlmtune.training.setup import Setup

log = logging.getLogger("vlmtune")


PASSES, UPDATE, AFTERWARDS = "passes", "update", "afterwards"
"""What a step does: forward and backward passes, the optimizer's update, and then logs, evaluation and checkpoint."""


def fit(run: Setup, progress: Progress, hooks: Hooks, summed_loss: Callable[[Any, Any], torch.Tensor]) -> None:
    """Train the steps that are left after `progress`."""
    trainer = run.config.trainer
    loop.fit(
        run.prepared,
        run.loader.micro_batches(progress.step),
        run.optimizer,
        run.scheduler,
        run.engine,
        summed_loss,
        progress,
        expected_tokens=run.loader.expected_tokens,
        max_grad_norm=trainer.max_grad_norm,
        skip_nonfinite=trainer.nonfinite == "skip",
        hooks=hooks,
    )


class Attempts:
    """Trains a run's steps: each again if it does not fit into memory."""

    def __init__(self, run: Setup, saving: Saving, hooks: Hooks):
        self.run, self.saving, self.progress = run, saving, saving.progress
        self.doing = PASSES
        self.in_backward = run.config.optimizer.step_in_backward
        follow, end = partial(self._now, AFTERWARDS), partial(self._now, PASSES)
        self.hooks = replace(hooks, after_step=(follow, *hooks.after_step, end))
        if not self.in_backward:
            optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
            optimizer.register_step_pre_hook(partial(self._now, UPDATE))
        self.first = self.progress.step
        while run.loader.halvings < self.progress.halvings:
            run.loader.halve()
        self.progress.halvings = run.loader.halvings

    def train(self, summed_loss: Callable[[Any, Any], torch.Tensor]) -> None:
        """Train the steps that are left. Raises what ends training early, such as NonFinite."""
        while True:
            try:
                return fit(self.run, self.progress, self.hooks, summed_loss)
            except Exception as error:
                if not self._may_halve(error):
                    self._failed(error)
                    raise
            self._halve()

    def _now(self, doing: str, *_: Any) -> None:
        self.doing = doing

    @property
    def _between(self) -> bool:
        """Whether weights, optimizer and progress are as they were before the present step."""
        return self.doing == PASSES and not self.in_backward

    def _may_halve(self, error: Exception) -> bool:
        run = self.run
        alone = run.engine.num_processes == 1  # else the other processes wait in this step, for this one's gradients
        wanted = run.config.trainer.auto_micro_batch and run.loader.order.most_rows > 1
        return is_out_of_memory(error) and wanted and alone and self._between

    def _halve(self) -> None:
        loader = self.run.loader
        self.run.optimizer.zero_grad(set_to_none=True)
        session.free_memory()
        loader.halve()
        self.progress.halvings = loader.halvings
        log.warning(
            "step %d does not fit into memory: it begins again, in micro-batches of %d rows at most",
            *(self.progress.step + 1, loader.order.most_rows),
        )

    def _failed(self, error: Exception) -> None:
        """Say what is known of a step that ran out of memory, and save what was reached before a step that failed."""
        run, step = self.run, self.progress.step
        alone = run.engine.num_processes == 1
        stuck = run.config.trainer.auto_micro_batch and not alone
        when = f"in step {step + 1}" + ", which can't begin again while other processes wait in it" * stuck
        if self.doing != AFTERWARDS:
            note(error, when, model=run.model, optimizer=run.optimizer, useless=["trainer.eval_batch_size"])
        if not (self._between and step > self.first and (alone or isinstance(error, NonFinite))):
            return
        try:
            self.saving.save()
            self.saving.wait()
        except Exception as failure:  # the error itself matters more
            log.warning("what was reached before could not be saved: %s", failure)
        else:
            log.info("resume=%s goes on after step %d", run.folder, step)
