"""What follows a step that fails: it begins again in smaller micro-batches, or what was reached before it is saved.

Both need weights, optimizer and progress as they were before the step. They are, unless the optimizer was at work or
what follows a step (logs, evaluation, a checkpoint) was not complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from vlmtune.errors import NonFinite, VlmtuneError
from vlmtune.launch import session
from vlmtune.memory import is_out_of_memory, note
from vlmtune.training.loop import Hooks
from vlmtune.training.saving import Saving

log = logging.getLogger("vlmtune")
ALONE = (
    "; other processes wait for this one, so the step can't begin again in smaller micro-batches: "
    "resume={folder} with a smaller trainer.batch_size goes on, with the same rows per step"
)


class Steps:
    """Knows whether the run's state is that between two steps."""

    def __init__(self, saving: Saving):
        self.run, self.saving, self.progress = saving.run, saving, saving.progress
        self.undisturbed = True
        plain = getattr(self.run.optimizer, "optimizer", self.run.optimizer)
        plain.register_step_pre_hook(lambda *_: self._disturb())

    def train(self, hooks: Hooks, fit: Callable[[Iterable[Any], Hooks], None]) -> None:
        """Call `fit` with the micro-batches that are left, again with smaller ones where they don't fit into memory."""
        around = (self._disturb, *hooks.after_step, self._settle)
        watched = replace(hooks, after_step=around)
        while True:
            try:
                return fit(self.run.loader.micro_batches(self.progress.step), watched)
            except Exception as error:
                if not self._halves(error):
                    self._explain(error)
                    self._save_before(error)
                    raise
            self.run.optimizer.zero_grad(set_to_none=True)
            session.free_memory()

    def _disturb(self, *_: Any) -> None:
        self.undisturbed = False

    def _settle(self, *_: Any) -> None:
        self.undisturbed = True

    @property
    def _restorable(self) -> bool:
        """Whether nothing of the failed step has reached the weights."""
        return self.undisturbed and not self.run.config.optimizer.step_in_backward
