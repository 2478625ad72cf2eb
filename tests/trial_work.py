"""What trials do in place of training, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlmtune.launch.signals import StopRequest
from vlmtune.record import runfolder


def result(folder: Path, status: str = "completed", **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runfolder.write_json(folder / "result.json", {"status": status, "objective": None, "error": None, **more})


def complete(folder: Path) -> int:
    """Also notes what the process was told of devices and threads."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    result(folder, objective=0.5, told={name: os.environ.get(name) for name in names}, group=os.getpgid(0))
    return 0


def complete_and_crash(folder: Path) -> int:
    complete(folder)
    os.abort()


def die(number: int) -> int:
    """By a signal that can't be handled, or is not."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(60)
    return 0


def leave(code: int) -> int:
    print("said by Python")
    sys.stdout.flush()
    os.system("echo said by another program")
    return code


def train(folder: Path, seconds: float) -> int:
    """As a run: it ends early after a step, and says so. With a process of its own beside it, as loaders are."""
    (folder / "pids").write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
    request = StopRequest()
    with request.watching():
        (folder / "began").touch()
        end = time.monotonic() + seconds
        while request.signal is None and time.monotonic() < end:
            time.sleep(0.02)
    result(folder, "interrupted" if request.signal else "completed", signal=request.signal)
    return 128 + request.signal if request.signal else 0


def hang(folder: Path) -> int:
    """Answers no signal."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    (folder / "pids").write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
    (folder / "began").touch()
    time.sleep(600)
    return 0
