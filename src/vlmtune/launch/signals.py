"""Ending on a signal: after the step in training, after the batch in evaluation, at once elsewhere, and never without a
result.json.

SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (a terminal that went away; under nohup it is ignored, and stays so).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal came while there was no step to finish."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class EvaluationStopped(Exception):
    """An evaluation stopped between two batches, as a signal asked for."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def handling(handler: Any) -> Iterator[dict[signal.Signals, Any]]:
    """Handle the signals while inside; only the main thread can, and others leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    watched = [number for number in SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in watched}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While inside, a signal raises `Interrupted`."""

    def handler(number: int, frame: Any) -> None:
        raise Interrupted(number)

    with handling(handler):
        yield


class StopRequest:
    """A signal that asks to end after the step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the first signal is noted; a second one ends the process as it would outside."""
        before: dict[Any, Any] = {}

        def handler(number: int, frame: Any) -> None:
            self.signal = number
            for watched, old in before.items():
                signal.signal(watched, old)

        with handling(handler) as replaced:
            before |= replaced
            yield
