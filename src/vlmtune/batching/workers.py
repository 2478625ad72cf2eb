"""Worker processes of the loader: how many, how far ahead of training, and the shared memory that their batches take.

Batches travel through shared memory (/dev/shm), which is small in containers: 64 MB by default in Docker. torch drops a
batch that doesn't fit and then waits for it without end, so what is on its way is limited to what is free.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, Self, TypeVar

import torch

from vlmtune import display
from vlmtune.errors import TrainingError
from vlmtune.memory import SHARED_MEMORY

log = logging.getLogger("vlmtune")
AHEAD = 2
"""Micro-batches that each process prepares in advance, as torch does by default."""
SHARED = "/dev/shm"


@dataclass(frozen=True)
class Workers:
    """The worker processes of one loader."""

    count: int
    """0: batches are made in the main process."""
    ahead: int
    """Micro-batches that each of them prepares in advance."""

    @classmethod
    def fitting(cls, asked: int, size: int, processes: int) -> tuple[Workers, str]:
        """At most `asked` workers whose batches of `size` bytes fit into the free shared memory, and a line for the
        log. `processes`: ranks of the run, of which there is one per GPU on a machine.

        Half of what is free may be used: the rest is for other programs and for NCCL.
        """
        if (free := free_shared_memory()) is None:
            return cls(asked, AHEAD), f"loader     {asked} processes, {AHEAD} micro-batches each in advance"
        budget = free // 2 // min(processes, torch.cuda.device_count() or processes)
        fitting = budget // max(size, 1)
        count = min(asked, fitting)
        workers = cls(count, min(AHEAD, fitting // count) if count else 0)
        found = f"{display.size(size, 'B')} a micro-batch, {display.size(free, 'B')} free in {SHARED}"
        sentence = f"loader     {count} processes, {workers.ahead} micro-batches each in advance ({found})"
        return workers, sentence if workers == cls(asked, AHEAD) else f"{sentence}; for more: {SHARED_MEMORY}"


def available(asked: int, items: Any, size: int, processes: int) -> Workers:
    """As many of the workers as possible for the dataset `items`, whose items have `size` bytes; a warning in the log
    says why there are fewer.
    """
    if (reason := unpicklable(items)) is not None:
        log.warning("rows are prepared in the main process, since they can't be sent to others: %s", reason)
        return Workers(0, 0)
    workers, sentence = Workers.fitting(asked, size, processes)
    log.log(logging.INFO if workers == Workers(asked, AHEAD) else logging.WARNING, sentence)
    return workers


class Sharable(Protocol):
    def share_memory(self) -> Self:
        """A copy with its tensors in shared memory. Raises RuntimeError if that is full."""


Made = TypeVar("Made", bound=Sharable)


def free_shared_memory() -> int | None:
    """Free bytes in shared memory; None where the system does not limit it by a file system."""
    return shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else None


def in_shared_memory(batch: Made) -> Made:
    """A worker's batch, ready to be sent. Raises TrainingError if shared memory is full: later, torch would only print
    it and drop the batch.
    """
    try:
        return batch.share_memory()
    except RuntimeError as error:
        raise TrainingError(f"{SHARED} is full ({error}); use {SHARED_MEMORY}, or trainer.num_workers=0") from error


def unpicklable(item: Any) -> str | None:
    """Why `item` can't be sent to worker processes, or None. Forked processes have it already."""
    if multiprocessing.get_start_method() == "fork":
        return None
    try:
        ForkingPickler(_Nowhere()).dump(item)
    except Exception as error:  # whatever the user's own records raise
        return str(error)
    return None


class _Nowhere:
    """A file that keeps nothing: a large table is not held in memory a second time."""

    def write(self, data: Any) -> int:
        return len(data)
