"""A signal ends a run early: all processes stop after the same step, or between two batches of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmtune.launch import signals
from vlmtune.training.setup import Setup


class Stopping:
    """Watches for signals. A signal that reached only some processes stops all of them."""

    def __init__(self, run: Setup):
        self.engine = run.engine
        elsewhere = run.writes and run.config.backend.name == "ray"  # whose workers get no signals
        self.own = signals.StopRequest(run.folder / signals.STOP_FILE if elsewhere else None)
        self.signal: int | None = None
        """The signal that ends the run, the same on every process."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the context, a signal is recorded and ends the run after the current step."""
        with self.own.watching():
            yield

    def asked(self) -> bool:
        """Whether to stop after this step. Every process calls this at the same step and gets the same answer."""
        if self.signal is None:
            self.signal = self._agreed()
        return self.signal is not None

    def _agreed(self) -> int | None:
        own = self.own.signal
        if self.engine.num_processes == 1:
            return own
        received = torch.tensor([float(own == number) for number in signals.SIGNALS], device=self.engine.device)
        reached = self.engine.reduce(received, "sum").tolist()
        return next((number for number, count in zip(signals.SIGNALS, reached, strict=True) if count), None)

    def pending(self) -> int | None:
        """The signal that this process received. Evaluations check it after each batch, then agree across processes."""
        return self.own.signal

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """If a signal stops an evaluation inside the context, it ends the run."""
        try:
            yield
        except signals.EvaluationStopped as stopped:
            self.signal = stopped.number
