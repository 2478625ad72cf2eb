"""A run folder belongs to one running process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vlmtune.errors import ConfigError

log = logging.getLogger("vlmtune")

NAME = ".lock"
LEASE = 180.0
"""Seconds after which a shared disk has let go of a lock whose machine is gone; NFS takes up to 90."""
HELD: set[IO[str]] = set()
"""The lock files of this process."""


def _let_go() -> None:
    """In a forked process (a loader's): or it would go on holding what its parent held."""
    for file in HELD:
        file.close()
    HELD.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be, while inside.

    Raises ConfigError that names the process that holds it, or says why it can't be written. The system
    lets go of the lock when its process ends, however that happens, so none is ever stale.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: can't be written: {error.strerror}; choose another hydra.run.dir") from error
    with file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        HELD.add(file)
        try:
            yield
        finally:
            HELD.discard(file)
            if not file.closed:  # it is, in a forked process that leaves this block
                file.truncate(0)


def check(folder: Path) -> None:
    """Raise ConfigError where a running process holds the folder."""
    if (folder / NAME).exists():
        try:
            file = (folder / NAME).open("a+")
        except OSError:  # `held` says what can't be done here
            return
        with file:
            _take(file, folder)


def wait(folder: Path) -> None:
    """Return once no running process holds the folder, or raise ConfigError after `LEASE` seconds."""
    end = time.monotonic() + LEASE
    while True:
        try:
            check(folder)
            return
        except ConfigError:
            if time.monotonic() >= end:
                raise
        time.sleep(1)


def _take(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise ConfigError(f"{folder}: is in use by {holder}; wait for that run, or stop it") from None
    except OSError as error:
        log.warning("%s: can't be locked (%s): don't start two runs in it", folder, error.strerror)
