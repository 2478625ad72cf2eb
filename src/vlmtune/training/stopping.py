"""A run ends early where a signal asks for it: all processes after the same step, or between two batches of an
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmtune.launch import signals


class Stopping:
    """Watches for signals, and makes one that reached some processes a signal for all."""

    def __init__(self, engine: Any):
        self.engine, self.own = engine, signals.Wish()
        self.signal: int | None = None
        """The signal that ends the run, the same on every process."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, a signal is noted and ends the run at the next good place."""
        with self.own.watching():
            yield

    def asked(self) -> bool:
        """Whether to end after this step; every process asks at the same step, and gets the same answer."""
        if self.signal is None:
            self.signal = self._agreed()
        return self.signal is not None

    def _agreed(self) -> int | None:
        own = self.own.signal
        if self.engine.num_processes == 1:
            return own
        wishes = torch.tensor([float(own == number) for number in signals.SIGNALS], device=self.engine.device)
        reached = self.engine.reduce(wishes, "sum").tolist()
        return next((number for number, count in zip(signals.SIGNALS, reached, strict=True) if count), None)

    def pending(self) -> int | None:
        """A signal that this process got: evaluations ask after each batch, and agree by themselves."""
        return self.own.signal

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation inside that a signal ends, on every process, ends the run."""
        try:
            yield
        except signals.Ended as ended:
            self.signal = ended.number
