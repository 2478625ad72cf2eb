"""Runs that are killed: at a place in the code, at a moment of some work, or at any moment."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import vlmtune
from vlmtune.training import checkpoint, finish, loop, scoring

WIDTH = 500
"""Bytes of what a process notes about itself."""
DOING = {
    "training": (loop, "fit"),
    "saving": (checkpoint, "write"),
    "evaluating": (scoring, "evaluate"),
    "exporting": (finish, "save_model"),
}
"""What a run does, and the function that does it."""


@dataclass(frozen=True)
class Kill:
    """Where a process is killed. By itself: in front of the `count`-th call of a function (`os.rename`) while it does
    `doing`. From outside: `share` of the usual time of `doing` after the `count`-th one has begun; of the whole run, if
    `doing` is null.
    """

    doing: str | None = None
    call: str | None = None
    count: int = 1
    share: float = 0.0


class Doing:
    """What this process does at each moment, noted in a file that is still there after a kill."""

    def __init__(self, file: Path):
        self.handle, self.lock = os.open(file, os.O_RDWR | os.O_CREAT), threading.RLock()
        self.now, self.begun, self.seconds = Counter[str](), Counter[str](), Counter[str]()
        self._write()

    def _write(self) -> None:
        now = [name for name, count in self.now.items() if count]
        text = json.dumps({"now": now, "begun": self.begun, "seconds": self.seconds})
        os.pwrite(self.handle, text.encode().ljust(WIDTH), 0)

    def noting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self.lock:
                self.now[name] += 1
                self.begun[name] += 1
                self._write()
            began = time.monotonic()
            try:
                return real(*args, **options)
            finally:
                with self.lock:
                    self.now[name] -= 1
                    self.seconds[name] += time.monotonic() - began  # type: ignore[assignment]
                    self._write()

        return call

    def killing(self, kill: Kill, real: Callable[..., Any]) -> Callable[..., Any]:
        left = kill.count

        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= self.now[str(kill.doing)] > 0
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call


def train(words: list[str], notes: Path, kill: Kill | None) -> None:
    """In a process of its own: a run that notes what it does, and kills itself where `kill` names a call."""
    forked.write_to(notes.with_suffix(".log"))
    doing = Doing(notes)
    for name, (module, function) in DOING.items():
        setattr(module, function, doing.noting(name, getattr(module, function)))
    if kill is not None and kill.call is not None:
        place, _, function = kill.call.rpartition(".")
        module = importlib.import_module(place)
        setattr(module, function, doing.killing(kill, getattr(module, function)))
    vlmtune.train(words)


@dataclass
class Ended:
    """How a process ended, and what it did then."""

    code: int | None
    now: list[str]
    begun: dict[str, int]
    seconds: dict[str, float]


class Starter:
    """Starts runs, and kills them."""

    def __init__(self, notes: Path):
        self.notes, self.usual, self.whole = notes, dict[str, float](), 0.0
        self.context = forked.context()

    def run(self, words: list[str], kill: Kill | None = None) -> Ended:
        """Wait for a run that is killed as `kill` says."""
        self.notes.write_bytes(json.dumps({"now": [], "begun": {}, "seconds": {}}).encode().ljust(WIDTH))
        process = self.context.Process(target=train, args=(words, self.notes, kill))
        process.start()
        if kill is not None and kill.call is None:
            self._wait(kill, process)
            process.kill()
        process.join()
        return Ended(process.exitcode, **json.loads(self.notes.read_bytes()[:WIDTH]))

    def straight(self, words: list[str]) -> Ended:
        """A run that nobody kills; what takes how long in it is usual from now on."""
        began = time.monotonic()
        ended = self.run(words)
        self.whole = time.monotonic() - began
        self.usual = {name: seconds / ended.begun[name] for name, seconds in ended.seconds.items()}
        return ended

    def _wait(self, kill: Kill, process: Any) -> None:
        if kill.doing is None:
            process.join(kill.share * self.whole)
            return
        while process.is_alive():
            try:
                begun = json.loads(self.notes.read_bytes()[:WIDTH])["begun"]
            except ValueError:  # read while it was written
                continue
            if begun.get(kill.doing, 0) >= kill.count:
                break
            time.sleep(0.0005)
        process.join(kill.share * self.usual[kill.doing])

    def output(self) -> str:
        return self.notes.with_suffix(".log").read_text()[-3000:]
