"""A run folder belongs to one running process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vlmtune.errors import ConfigError

log = logging.getLogger("vlmtune")

NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder while inside. Raises ConfigError that names the process that holds it.

    The system lets go of the lock when its process ends, however that happens, so none is ever stale.
    """
    try:
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: can't be written: {error.strerror}; choose another hydra.run.dir") from error
    with file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        os.register_at_fork(after_in_child=file.close)  # or a loader's process would go on holding it
        try:
            yield
        finally:
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


def _take(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise ConfigError(f"{folder}: is in use by {holder}; let that run end, or end it, first") from None
    except OSError as error:
        log.warning("%s: can't be locked (%s): don't start two runs in it", folder, error.strerror)
