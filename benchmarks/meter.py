"""Time, memory and waiting of one training process, by phase. Works alike for every contender.

vlmtune itself resets torch's peak and empties its cache at the first step, so its `train` has nothing of the start in
it, and up to the last 20 ms of the start may be missing from its `start`.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

PHASES = ("load", "start-up", "first step", "training", "evaluation")
MARK = '{"bench": '
"""How each line on standard output begins that is meant for the process above."""


def say(**values: Any) -> None:
    """Tell the process above, which reads these lines even where this process is ended from outside."""
    print(MARK + json.dumps(values) + "}", flush=True)


class Watch:
    """What a contender calls on its way: `enter` at the start of each phase, `step` after each optimizer step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def enter(self, phase: str) -> None:
        """`phase`: one of `PHASES`."""

    def step(self, rows: int) -> None:
        self.times.append((time.time(), rows))


class Meter(Watch):
    """Also notes the peaks of each phase, and how long the process waited for its loader.

    Peaks in bytes: `allocated` and `reserved` by torch, and `driver`, what the device says is in use by all processes;
    on a CPU `driver` is the resident memory of this process alone. A thread samples them: the driver knows no peak,
    and a contender may reset torch's.
    """

    EVERY = 0.02
    """Seconds between samples."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase, self.waited = "load", 0.0
        self.waits: list[float] = []
        """Seconds waited for data before the end of each step, counted from the start."""
        self.lock = threading.Lock()
        _time_loaders(self)
        threading.Thread(target=self._sample, daemon=True).start()

    def enter(self, phase: str) -> None:
        import torch

        self._note()
        with self.lock:
            self.phase = phase
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        say(phase=phase)

    def step(self, rows: int) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().step(rows)
        self.waits.append(self.waited)
        if len(self.times) == 1:
            self.enter("training")

    def peak(self, kind: str, *phases: str) -> int | None:
        """The highest of some phases; None where it was not measured."""
        self._note()
        return max((self.peaks[p][kind] for p in phases if kind in self.peaks.get(p, {})), default=None)

    def _sample(self) -> None:
        while True:
            self._note()
            time.sleep(self.EVERY)

    def _note(self) -> None:
        with self.lock:
            own = self.peaks.setdefault(self.phase, {})
            for kind, value in _memory().items():
                own[kind] = max(own.get(kind, 0), value)


def _memory() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        lines = Path("/proc/self/status").read_text().splitlines()
        return {"driver": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))}
    free, total = torch.cuda.mem_get_info()
    torch_own = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {**torch_own, "driver": total - free}


def _time_loaders(meter: Meter) -> None:
    """Count the time that this process spends in torch's loaders: preparing batches, or waiting for their workers."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    plain = _BaseDataLoaderIter.__next__

    def timed(self: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(self)
        finally:
            meter.waited += time.perf_counter() - began

    _BaseDataLoaderIter.__next__ = timed  # type: ignore[method-assign]
