"""Start the processes of a run on this machine, watch them, and end them together."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from vlmtune.commands import import_path
from vlmtune.config.schema import BackendConfig
from vlmtune.errors import ConfigError, TrainingError, to_install
from vlmtune.launch import ranks
from vlmtune.launch.signals import handling
from vlmtune.launch.world import World

GRACE = 2.0
"""Seconds that processes get to end by themselves after one of them failed."""
PATIENCE = 30.0
"""Seconds that they get after SIGTERM; torchrun's."""
SHOWN = 2000
"""The most characters to show of the output of a process that failed."""


def to_start(backend: BackendConfig, world: World) -> int:
    """How many processes this one has to start; 1: none, the run happens in this process, or in Ray's workers.

    Raises ConfigError if a launcher started another number of them than asked for, if no number is known, or if Ray
    can't be used.
    """
    if backend.name == "ray":
        _check_ray(world)
    if backend.name != "accelerate":
        return 1
    if not world.is_alone:
        if backend.num_processes not in (None, world.processes):
            raise ConfigError(
                f"backend.num_processes={backend.num_processes}: but a launcher started {world.processes} processes; "
                "leave one of the two out"
            )
        return 1
    count = backend.num_processes or _gpus()
    if not count:
        raise ConfigError("backend=accelerate: this machine has no GPU to count; set backend.num_processes")
    return count


def _check_ray(world: World) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"backend=ray needs the package ray: {to_install('ray')}")
    if not world.is_alone:
        raise ConfigError(
            f"backend=ray: but a launcher started {world.processes} processes; start this command once, without it"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` processes of one run. Returns the first rank's exit code, or another's if that is 0.

    Signals are passed on to all of them. If one fails, the first rank is told and the others are ended. They also end
    if this process is killed. Only the first rank writes to the terminal. Raises TrainingError with what ended the rank
    that failed, and its output, where the first one could not tell.
    """
    error, started = None, list[Any]()
    with ExitStack() as stack:
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count))]
        meeting = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        shared = _environment(count, meeting.getsockname()[1])
        signals = stack.enter_context(_passed_on(started))
        stack.callback(_end, started)
        started += (_start(command, rank, shared, output) for rank, output in enumerate(outputs))
        store = _store(meeting)
        failed = _first_failure(started, signals)
        if failed is not None and (code := started[failed].returncode) < 128:  # else a signal to that one ended it
            error = _ending(code, outputs[failed])
            ranks.tell(ranks.of_run(store), failed, error)
        _wait(started, GRACE)
    codes = [process.returncode for process in started]
    if error is not None and not 0 < codes[0] < 128:
        raise TrainingError(f"rank {failed}: {error}")
    return next((128 - code if code < 0 else code for code in codes if code), 0)


def _environment(count: int, port: int) -> dict[str, str]:
    """What torchrun sets for all processes, a share of the cores for each, and the path of this package."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(cores // count, 1))
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "PYTHONPATH": import_path()}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0"}
    return {"OMP_NUM_THREADS": threads, **os.environ, **world, **store, "TORCHELASTIC_USE_AGENT_STORE": "True"}


def _store(meeting: socket.socket) -> Any:
    """The store by which the processes find each other and tell of errors. It lives here, as under torchrun, so that no
    rank's end takes it away.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = meeting.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach())


def _start(command: Sequence[str], rank: int, shared: dict[str, str], output: IO[bytes] | None) -> Any:
    """One process, in a process group of its own: a Ctrl-C on the terminal reaches it once, through this process."""
    return subprocess.Popen(
        command,
        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """Have the system send SIGTERM to this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


@contextmanager
def _passed_on(started: Sequence[Any]) -> Iterator[list[int]]:
    """While inside, signals to this process go to all of `started`, the third one as SIGKILL; yields the list of those
    that came.
    """
    signals: list[int] = []

    def handler(number: int, frame: Any) -> None:
        signals.append(number)
        for process in started:  # does nothing for one that has ended
            process.send_signal(number if len(signals) < 3 else signal.SIGKILL)

    with handling(handler):
        yield signals


def _first_failure(started: Sequence[Any], signals: Sequence[int]) -> int | None:
    """Return when all have ended, or one has failed: its rank. One that ended by one of `signals` did not fail: the
    first rank may need longer, to write everything.
    """
    while True:
        codes = [process.poll() for process in started]
        fine = {None, 0, *(-number for number in signals), *(128 + number for number in signals)}
        if wrong := [rank for rank, code in enumerate(codes) if code not in fine]:
            return wrong[0]
        if None not in codes:
            return None
        time.sleep(0.05)


def _wait(started: Sequence[Any], seconds: float) -> None:
    """Return when all have ended, or after so many seconds."""
    end = time.monotonic() + seconds
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(end - time.monotonic(), 0))


def _end(started: Sequence[Any]) -> None:
    """End those that still run: by SIGTERM, and after `PATIENCE` by SIGKILL to what is left of their groups."""
    for process in started:
        process.terminate()  # does nothing for one that has ended
    _wait(started, PATIENCE)
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ending(code: int, output: IO[bytes] | None) -> TrainingError:
    """How a process ended, and the end of its output."""
    said = ""
    if output is not None:
        output.seek(0)
        said = output.read().decode(errors="replace").strip()[-SHOWN:]
    how = f"failed with exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}" + OUT_OF_MEMORY * (code == -signal.SIGKILL)
    return TrainingError("\n".join(filter(None, [how, said])))


OUT_OF_MEMORY = ", most often as the machine is out of memory"
"""Why the system kills a process."""
