"""What a trial's folder says while the trial runs. Only what is new in it is read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vlmtune.errors import CheckpointError
from vlmtune.record import runfolder
from vlmtune.trials.trial import Trial


class Watched:
    """A trial, and how far it has come. What it can't read yet, or no more, it leaves as it was."""

    def __init__(self, trial: Trial, metric: str):
        """`metric`: the name that it has in task.metrics."""
        self.trial, self.key = trial, f"eval/{metric}"
        self.step, self.total = 0, 0
        """Optimizer steps done, and in all; 0 where that is not known."""
        self.metric: float | None = None
        """The last evaluation of the trained model; of a completed trial what its result says."""
        self.loss: float | None = None
        self.result: dict[str, Any] | None = None
        """What result.json holds, once the trial is over."""
        self._file = trial.folder / "metrics.jsonl"
        self._earlier = _identity(self._file)
        self._inode, self._offset = 0, 0
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def read(self, now: float) -> None:
        """Read what is new. `now`: as `time.monotonic`."""
        if self.result is not None or self.trial.state == "waiting":
            return
        if _identity(self._file) != self._earlier:  # else what an earlier command left of this trial
            self._follow(now)
        if self.trial.is_over:
            self._conclude()

    def left(self, now: float) -> float | None:
        """Seconds until its last step, by the pace of its steps so far; None where that is not known."""
        if self._first is None or self._last[1] == self._first[1]:
            return None
        (step, began), (last, seen) = self._first, self._last
        return max((seen - began) / (last - step) * (self.total - last) - (now - seen), 0.0)

    @property
    def failure(self) -> str:
        """The class of its failure."""
        return str(self._error.get("failure") or "other")

    @property
    def reason(self) -> str:
        """The first line of its error."""
        lines = str(self._error.get("message") or "it left no result.json").splitlines()
        return lines[0] + " ..." * (len(lines) > 1)

    @property
    def _error(self) -> dict[str, Any]:
        return (self.result or {}).get("error") or {}

    def _follow(self, now: float) -> None:
        """Read the whole lines that are new in metrics.jsonl, which a restart inside the trial replaces."""
        try:
            with self._file.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset, self._first = inode, 0, None
                    self.step, self.total = 0, _total_steps(self.trial.folder)
                file.seek(self._offset)
                text = file.read().rpartition(b"\n")[0]
        except OSError:
            return
        self._offset += len(text) + 1 if text else 0
        for line in text.splitlines():
            self._take(line)
        if self.step and (self._first is None or self.step != self._last[0]):
            self._last = (self.step, now)
            self._first = self._first or self._last

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "train/loss" in row:
                self.step, self.loss = int(row["step"]), _number(row["train/loss"])
            if self.key in row and row["step"]:  # at step 0 it is the untrained model's
                self.metric = _number(row[self.key])
        except (ValueError, TypeError, KeyError):  # a line that the disk did not take whole
            return

    def _conclude(self) -> None:
        try:
            self.result = runfolder.read_result(self.trial.folder) or {}
        except CheckpointError as error:
            self.result = {"error": {"failure": "other", "message": str(error)}}
        self.step = self.result.get("steps") or self.step
        metrics = self.result.get("metrics") or {}
        self.metric = metrics.get(self.key, self.metric)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _total_steps(folder: Path) -> int:
    try:
        return int(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["total_steps"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _number(value: Any) -> float:
    """What metrics.jsonl holds of a number: NaN and infinities are null there."""
    return math.nan if value is None else float(value)
