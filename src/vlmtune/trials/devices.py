"""Which GPUs a trial gets, and how many threads."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import Any

from vlmtune.errors import TrainingError

VISIBLE, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


def found(context: Any) -> list[str]:
    """The GPUs of this machine that may be used, by their names for CUDA_VISIBLE_DEVICES.

    `context`: of multiprocessing. Torch is asked in a process of its own, as it would take seconds to import here.
    Raises TrainingError where none can be started.
    """
    shown = os.environ.get(VISIBLE)
    if shown is not None and not shown.strip():
        return []
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs,))
    process.start()
    theirs.close()
    try:
        count = ours.recv()
    except EOFError:
        raise TrainingError("the process that trials are started from has ended; the output above says why") from None
    process.join()
    names = shown.split(",") if shown else [str(number) for number in range(count)]
    return [name.strip() for name in names][:count]


def _tell(connection: Connection) -> None:
    import torch

    connection.send(torch.cuda.device_count())


class Devices:
    """The GPUs, and how many trials use each."""

    def __init__(self, names: list[str], parallel: int | None):
        """`parallel`: the trials that run at once; None: as many as have GPUs of their own, or one without GPUs."""
        self.load, self.parallel, self.running = dict.fromkeys(names, 0), parallel, 0

    def count(self, processes: int | None) -> int:
        """How many GPUs so many processes take; None: all."""
        return len(self.load) if processes is None else processes

    def has_room(self, count: int) -> bool:
        """Whether a trial of `count` processes can begin now."""
        if self.parallel is not None:
            return self.running < self.parallel
        free = sum(load == 0 for load in self.load.values())
        return self.running == 0 or 0 < count <= free

    def take(self, count: int) -> list[str]:
        """The GPUs of a trial that begins: those that the fewest others use."""
        self.running += 1
        chosen = sorted(self.load, key=lambda name: self.load[name])[:count]
        for name in chosen:
            self.load[name] += 1
        return chosen

    def give_back(self, names: list[str]) -> None:
        self.running -= 1
        for name in names:
            self.load[name] -= 1

    def environment(self, names: list[str], count: int) -> dict[str, str]:
        """What a trial of `count` processes is told: its GPUs and, where others run at the same time, its share of the
        cores for each process.
        """
        at_once = self.parallel or max(len(self.load) // max(count, 1), 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = at_once > 1 and THREADS not in os.environ
        threads = {THREADS: str(max(cores // (at_once * max(count, 1)), 1))} if shared else {}
        return ({VISIBLE: ",".join(names)} if names else {}) | threads
