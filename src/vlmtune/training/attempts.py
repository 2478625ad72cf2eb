"""What follows a step that fails: it begins again in smaller micro-batches, or what was reached before it is saved.

Both need weights, optimizer and progress as they were before the step. They are, unless the optimizer was at work, or
what follows a step (logs, evaluation, a checkpoint) was not complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vlmtune.errors import NonFinite
from vlmtune.launch import session
from vlmtune.memory import is_out_of_memory, note
from vlmtune.training import loop
from vlmtune.training.loop import Hooks
from vlmtune.training.saving import Saving
from vlmtune.training.setup import Setup

log = logging.getLogger("vlmtune")


class Attempts:
    """Trains a run's steps: each again if it does not fit into memory."""

    def __init__(self, run: Setup, saving: Saving, hooks: Hooks):
        self.run, self.saving, self.progress = run, saving, saving.progress
        self.hooks = replace(hooks, after_step=(self._follow, *hooks.after_step, self._end))
        self.between = not run.config.optimizer.step_in_backward
        """Whether weights, optimizer and progress are as they were before the present step."""
        if self.between:
            getattr(run.optimizer, "optimizer", run.optimizer).register_step_pre_hook(self._begin)
        self.following = False
        """Whether what follows a step is at work: logs, evaluation, a checkpoint."""
        self.first = self.progress.step
        while run.loader.halvings < self.progress.halvings:
            run.loader.halve()
        self.progress.halvings = run.loader.halvings

    def train(self, summed_loss: Callable[[Any, Any], torch.Tensor]) -> None:
        """Train the steps that are left. Raises what ends training early, such as NonFinite."""
        while True:
            try:
                return self._fit(summed_loss)
            except Exception as error:
                if not self._may_halve(error):
                    self._failed(error)
                    raise
            self._halve()

    def _fit(self, summed_loss: Callable[[Any, Any], torch.Tensor]) -> None:
        run, trainer = self.run, self.run.config.trainer
        loop.fit(
            run.prepared,
            run.loader.micro_batches(self.progress.step),
            run.optimizer,
            run.scheduler,
            run.engine,
            summed_loss,
            self.progress,
            expected_tokens=run.loader.expected_tokens,
            max_grad_norm=trainer.max_grad_norm,
            skip_nonfinite=trainer.nonfinite == "skip",
            hooks=self.hooks,
        )

    def _begin(self, *_: Any) -> None:
        self.between = False

    def _follow(self, *_: Any) -> None:
        self.between, self.following = False, True

    def _end(self, *_: Any) -> None:
        self.following = False
        self.between = not self.run.config.optimizer.step_in_backward

    def _may_halve(self, error: Exception) -> bool:
        run = self.run
        alone = run.engine.num_processes == 1  # else the other processes wait in this step, for this one's gradients
        wanted = run.config.trainer.auto_micro_batch and run.loader.order.most_rows > 1
        return is_out_of_memory(error) and wanted and alone and self.between

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
        if not self.following:
            note(error, when, model=run.model, optimizer=run.optimizer, useless=["trainer.eval_batch_size"])
        if not (self.between and step > self.first and (alone or isinstance(error, NonFinite))):
            return
        try:
            self.saving.save()
            self.saving.wait()
        except Exception as failure:  # the error itself matters more
            log.warning("what was reached before could not be saved: %s", failure)
        else:
            log.info("resume=%s goes on after step %d", run.folder, step)
