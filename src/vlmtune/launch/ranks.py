"""One error for all processes of a run: the rank that fails says why, and the first rank writes it down.

The others only see a connection that closes, or a launcher that ends them. Told through the store that the ranks found
each other by (MASTER_ADDR, MASTER_PORT), which torchrun keeps until its last process has ended.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vlmtune.errors import VlmtuneError, of_kind, storage_advice
from vlmtune.launch.world import World
from vlmtune.memory import memory_advice

log = logging.getLogger("vlmtune")
COUNT, FIRST = "vlmtune/errors", "vlmtune/error"
SECONDS = 5
"""That a rank waits for the store at most."""


def _store(world: World) -> Any:
    """The launcher's store. Raises RuntimeError where there is none any more."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if world.address is None or world.port is None:
        raise RuntimeError("the launcher named no store (MASTER_ADDR, MASTER_PORT)")
    timeout = timedelta(seconds=SECONDS)
    return TCPStore(world.address, world.port, is_master=False, timeout=timeout, wait_for_workers=False)


@contextmanager
def reporting(world: World) -> Iterator[None]:
    """An error on a rank other than the first is told to the first one."""
    try:
        with memory_advice(), storage_advice():
            yield
    except Exception as error:
        report(error, world)
        raise


def report(error: Exception, world: World) -> None:
    """Leave `error` for the first rank, unless another rank was earlier."""
    problems = error.problems if isinstance(error, VlmtuneError) else [f"{type(error).__name__}: {error}"]
    kind = type(error).__name__ if isinstance(error, VlmtuneError) else "TrainingError"
    text = json.dumps({"kind": kind, "problems": [f"rank {world.rank}: {problem}" for problem in problems]})
    try:
        store = _store(world)
        if store.add(COUNT, 1) == 1:
            store.set(FIRST, text)
    except RuntimeError as failure:  # no store, or its process is gone: this rank's own output has the error
        log.debug("the first rank could not be told: %s", failure)


@contextmanager
def closed_at_exit(world: World) -> Iterator[None]:
    """Have the connections to the other ranks closed when Python ends, after a run inside.

    A gloo group that is open then aborts the process, on its threads (torch 2.13). NCCL closes a group with all ranks
    together, so not where one of them failed.
    """
    finished = False
    try:
        yield
        finished = True
    finally:
        if not world.is_alone:
            from torch import distributed

            if distributed.is_initialized() and (finished or distributed.get_backend() == "gloo"):
                atexit.unregister(_close)
                atexit.register(_close)


def _close() -> None:
    from torch import distributed

    gc.collect()  # the wrapper around a model of several ranks lies in a cycle, and holds the group open
    if distributed.is_initialized():
        distributed.destroy_process_group()


SILENT = (
    "another process of this run ended and left no reason: it was killed, most often as the machine was out of memory, "
    "or it crashed. Its own output, the launcher's or the system's log may say more"
)


def is_broken_connection(error: BaseException) -> bool:
    """Whether it is what gloo and NCCL say where another process is gone."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))


def reported(world: World) -> VlmtuneError | None:
    """The error that another rank left, None where there is none."""
    try:
        store = _store(world)
        if not store.check([COUNT]):
            return None
        found = json.loads(store.get(FIRST))
    except RuntimeError:
        return None
    return of_kind(found["kind"], found["problems"])
