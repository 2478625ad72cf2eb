"""Ending on a signal: after the step in training, after the batch in evaluation, at once elsewhere, and never without a
result.json.

SIGINT (Ctrl-C), SIGTERM (a scheduler), SIGHUP (a terminal that went away; under nohup it is ignored, and stays so),
SIGUSR1 and SIGUSR2 (a scheduler whose time limit is near). At the end the handler that was there before gets the
signal: it may requeue the job, as submitit's does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


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


class _Noting:
    """A handler that notes which signals came, in their order."""

    def __init__(self, handler: Callable[[int, Any], None]):
        self.handler, self.came = handler, dict[int, None]()

    def __call__(self, number: int, frame: Any) -> None:
        self.came[number] = None
        self.handler(number, frame)

    def hand_on(self, before: dict[signal.Signals, Any]) -> None:
        """Give what came to the handlers of `before`: one of ours notes it, the caller's own is called."""
        for number in self.came:
            old = before[signal.Signals(number)]
            if isinstance(old, _Noting):
                old.came[number] = None
            elif callable(old) and old is not signal.default_int_handler:
                old(number, None)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Handle the signals while inside; yields the handlers of before, which get the signals that came at the end.

    Only the main thread can handle signals, and others leave them alone. Ignored ones stay ignored, but for SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    noting, present = _Noting(handler), {number: signal.getsignal(number) for number in SIGNALS}
    taken = [n for n, old in present.items() if old is not None and (n == signal.SIGINT or old != signal.SIG_IGN)]
    before = {number: signal.signal(number, noting) for number in taken}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        noting.hand_on(before)


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
        """While inside, the first signal is noted; the same one again, or SIGINT, ends the process as it would outside.

        Another one asks for no more: at a time limit, schedulers send SIGTERM after the signal that announced it.
        """
        before: dict[Any, Any] = {}

        def handler(number: int, frame: Any) -> None:
            self.received = self.received or number
            for repeated in {number, signal.SIGINT} & before.keys():
                signal.signal(repeated, before[repeated])

        with handling(handler) as replaced:
            before |= replaced
            yield
