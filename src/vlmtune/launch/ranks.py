"""One error for all processes of a run: the rank that fails says why, and the first rank writes it down.

The others only see a connection that closes, or a launcher that ends them. Told through the store that the ranks found
each other by (MASTER_ADDR, MASTER_PORT), which torchrun keeps until its last process has ended.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from vlmtune.errors import ConfigError, LostProcess, TrainingError, VlmtuneError, of_kind, storage_advice
from vlmtune.launch.signals import Interrupted
from vlmtune.launch.world import World
from vlmtune.memory import memory_advice

log = logging.getLogger("vlmtune")
COUNT, FIRST, ARRIVED, LISTENS = "errors", "error", "arrived", "first rank is here"
PROCESS, SIGNAL = "process", "signal"
SECONDS, UNHEARD = 10, 60
"""That a rank waits for the store at most, and for the first rank to listen."""
POLL = 0.1
"""Seconds between two looks into the store."""
_runs = 0
"""That ended in this process: an error of one is not taken for the next one's."""


def _store(world: World) -> Any:
    """The launcher's store. Raises RuntimeError where there is none any more."""
    if world.address is None or world.port is None:
        raise RuntimeError("the launcher named no store (MASTER_ADDR, MASTER_PORT)")
    return of_run(_connected(world.address, world.port), world.attempt, _runs)


@functools.cache  # to connect may take seconds (torch 2.13)
def _connected(address: str, port: int) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS), wait_for_workers=False)


def of_run(store: Any, attempt: int = 0, run: int = 0) -> Any:
    """The part of a store that is for one run of one start of the processes."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"vlmtune/{attempt}/{run}", store)


@contextmanager
def reporting(world: World) -> Iterator[None]:
    """A rank other than the first tells the first one that it is there, and what ends it early."""
    process = f"{PROCESS} {world.rank}"
    _note(world, process, f"{os.getpid()} {socket.gethostname()}")
    try:
        with memory_advice(), storage_advice():
            yield
    except SystemExit as left:  # by a user's own function; with code 0 the launcher would see nothing wrong
        error = TrainingError(f"sys.exit({left.code!r}) was called")
        report(error, world)
        raise error from left
    except (Interrupted, KeyboardInterrupt) as stopped:
        _note(world, SIGNAL, str(getattr(stopped, "number", signal.SIGINT.value)))
        raise
    except Exception as error:
        if is_broken_connection(error):  # because of another rank
            raise silent(error) from error
        report(error, world)
        raise
    finally:
        _note(world, process, "")  # it has said what there was to say


def _note(world: World, key: str, text: str) -> None:
    if world.has_agent:
        with suppress(RuntimeError):
            _store(world).set(key, text)


def report(error: Exception, world: World) -> None:
    """Leave `error` for the first rank to tell, unless another rank was earlier; log it where that can't be."""
    if vars(error).get("is_reported"):  # by a `reporting` inside of this one
        return
    vars(error)["is_reported"] = True
    try:
        store = _store(world)
        tell(store, world.rank, error)
        end = time.monotonic() + UNHEARD
        while not (_met() or store.check([LISTENS])):  # it may fail alike before, and the launcher then ends this one
            if time.monotonic() > end:
                raise RuntimeError("the first rank does not listen yet")
            time.sleep(POLL)
    except RuntimeError:
        log.error("rank %d: %s", world.rank, error, exc_info=not isinstance(error, VlmtuneError))


def tell(store: Any, rank: int, error: Exception) -> None:
    """Leave an error of a rank in the run's store, unless there is one."""
    own = isinstance(error, VlmtuneError)
    problems = error.problems if isinstance(error, VlmtuneError) else [f"{type(error).__name__}: {error}"]
    found = {
        "kind": type(error).__name__ if own else "TrainingError",
        "problems": [f"rank {rank}: {problem}" for problem in problems],
        "traceback": None if own else "".join(traceback.format_exception(error)),
    }
    if store.add(COUNT, 1) == 1:
        store.set(FIRST, json.dumps(found))


def _met() -> bool:
    """Whether this process has joined the others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def meet(world: World) -> None:
    """Return when all ranks are here. Raises the error of one that failed before.

    Torch would wait for it for hours, and answer no signal; so it does where the launcher has no store of its own.
    """
    if world.is_alone or not world.has_agent:
        return
    try:
        store = _store(world)
        store.add(ARRIVED, 1)
        if world.is_main:
            store.set(LISTENS, "")
        while store.add(ARRIVED, 0) < world.processes:
            if error := _told(store):
                raise error
            time.sleep(POLL)
    except RuntimeError as error:
        raise ConfigError(
            f"the launcher of this process (MASTER_ADDR={world.address}, MASTER_PORT={world.port}) does not answer. If "
            "these are left over from another job, unset them, RANK and WORLD_SIZE"
        ) from error


@contextmanager
def closed_at_exit(world: World) -> Iterator[None]:
    """Have the connections to the other ranks closed when Python ends, after a run inside.

    A gloo group that is open then aborts the process, on its threads (torch 2.13). NCCL closes a group with all ranks
    together, so not where one of them failed.
    """
    global _runs
    finished = False
    try:
        yield
        finished = True
    finally:
        _runs += 1
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


def silent(seen: BaseException, who: str = "another process of this run") -> LostProcess:
    """The error where a process is gone without a word. `seen`, how this one learned of it, goes into the log."""
    log.info("%s", seen)
    return LostProcess(
        f"{who} ended and left no reason: it was killed, most often as the machine was out of memory, or it crashed. "
        "Its own output, the launcher's or the system's log may say more"
    )


def is_broken_connection(error: BaseException) -> bool:
    """Whether it is what gloo and NCCL say where another process is gone."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))


def cause(error: BaseException, world: World) -> VlmtuneError | Interrupted | None:
    """What happened on another rank, where `error` follows from it: a broken connection, or a launcher's signal."""
    broken = is_broken_connection(error)
    if broken:
        time.sleep(5 * POLL)  # until a launcher that watches the processes has seen it
    if found := reported(world):
        return found
    if (broken or isinstance(error, Interrupted)) and (gone := lost(world)):
        return silent(error, f"rank {gone[0]}")
    return (_signalled(world) or silent(error)) if broken else None


def reported(world: World) -> VlmtuneError | None:
    """The error that another rank left, None where there is none."""
    try:
        return _told(_store(world))
    except RuntimeError:
        return None


def _told(store: Any) -> VlmtuneError | None:
    if not store.check([COUNT]):
        return None
    found = json.loads(store.get(FIRST))
    if found["traceback"]:
        log.error("%s\n%s", found["problems"][0], found["traceback"])
    return of_kind(found["kind"], found["problems"])


def _signalled(world: World) -> Interrupted | None:
    """The signal that ended another rank."""
    with suppress(RuntimeError):
        if (store := _store(world)).check([SIGNAL]):
            return Interrupted(int(store.get(SIGNAL)))
    return None


def lost(world: World) -> list[int]:
    """The ranks on this machine that are gone and did not say so."""
    found = []
    with suppress(RuntimeError):
        store = _store(world)
        for rank in range(1, world.processes):
            key = f"{PROCESS} {rank}"
            pid, _, host = (store.get(key).decode() if store.check([key]) else "").partition(" ")
            if host == socket.gethostname() and not _runs_here(int(pid)):
                found.append(rank)
    return found


def _runs_here(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
