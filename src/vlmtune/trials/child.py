"""The process of a trial: forked from one that has imported everything, and the leader of a process group."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from vlmtune.launch.processes import PATIENCE
from vlmtune.launch.signals import Interrupted, ending_at_once
from vlmtune.trials.devices import THREADS

OUTPUT = "output.log"
"""In a trial's folder: what it would have written to the terminal."""


def begin(work: Callable[[], int], folder: Path, environment: dict[str, str]) -> None:
    """Do a trial's `work` in this process, and end it with the exit code that this returns.

    `environment`: variables of this trial alone.
    """
    os.setsid()
    try:
        with ending_at_once():
            _write_to(folder / OUTPUT)
            os.environ.update(environment)
            threading.Thread(target=_end_with, args=(_parent().sentinel,), daemon=True).start()
            if THREADS in environment and "torch" in sys.modules:  # which read the variable when it was imported
                import torch

                torch.set_num_threads(int(environment[THREADS]))
            sys.exit(work())
    except Interrupted as stopped:
        sys.exit(128 + stopped.number)


def _write_to(file: Path) -> None:
    """Send what Python and C write to the terminal to the end of a file."""
    folder = file.parent
    folder.mkdir(parents=True, exist_ok=True)
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for standard in (1, 2):
        os.dup2(output, standard)


def _parent() -> Any:
    return multiprocessing.parent_process()


def _end_with(sentinel: int) -> None:
    """When the process that started this one is gone, however it ended: end this one as by SIGTERM, and after
    `PATIENCE` whatever is left of its group.
    """
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.killpg(0, signal.SIGKILL)
