"""Ending on a signal: after the step in training, after the batch in evaluation, at once elsewhere, and never without a
result.json.

SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (a terminal that went away; under nohup it is ignored, and stays so).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


STOP_FILE = ".stop"
"""In the run folder: holds the number of a signal that a process elsewhere got for the run."""


def ask_to_stop(folder: Path, number: int) -> None:
    """Ask the run in `folder`, whose processes get no signals of their own, to end after its step."""
    partial = folder / f"{STOP_FILE}.partial"
    partial.write_text(str(int(number)))
    partial.replace(folder / STOP_FILE)


class StopRequest:
    """A signal that asks to end after the step: one that this process got, or whose number is in `file`."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.received: int | None = None

    @property
    def signal(self) -> int | None:
        if self.received is None and self.file is not None and self.file.exists():
            self.received = int(self.file.read_text())
        return self.received

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the first signal is noted; a second one ends the process as it would outside."""
        before: dict[Any, Any] = {}

        def handler(number: int, frame: Any) -> None:
            self.received = number
            for watched, old in before.items():
                signal.signal(watched, old)

        with handling(handler) as replaced:
            before |= replaced
            yield
