"""Start trials as processes, watch them, and write down how one ended that can't do so any more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from typing import Any

from vlmtune.errors import Killed, TimeLimit, TrainingError, VlmtuneError
from vlmtune.launch.processes import OUT_OF_MEMORY, PATIENCE
from vlmtune.launch.signals import Interrupted, handling
from vlmtune.record import runfolder
from vlmtune.trials import child, files
from vlmtune.trials.devices import Devices, found
from vlmtune.trials.trial import Trial

LOOK_SECONDS = 0.5
"""How often the screen is brought up to date."""
LOOKS_ONLY = ("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
"""So that to ask for a GPU does not open it: a process that has can't be forked."""


@dataclass
class Work:
    """What a trial does, and what it needs."""

    call: Callable[[], int]
    """Sent to the trial's process; returns its exit code."""
    processes: int | None = 1
    """How many processes, each with a GPU of its own, it takes on this machine; None: as many as there are GPUs."""


@dataclass
class Running:
    """A trial that runs."""

    trial: Trial
    process: Any
    devices: list[str]
    deadline: float
    """When its time is over, as `time.monotonic` counts."""
    kill_at: float | None = None
    """When it is killed, if it has not ended by then; set once its time is over."""

    def send(self, number: int) -> None:
        """A signal to the trial's process, which passes it on; SIGKILL to the whole group."""
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                self._kill()
            else:
                os.kill(self.process.pid, number)

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            if self.process.is_alive():
                os.kill(self.process.pid, signal.SIGKILL)


class Runner:
    """Runs the trials of a sweep, several at a time."""

    def __init__(self, parallel: int | None, max_minutes: float | None, modules: Sequence[str]):
        """`parallel`, `max_minutes`: as in `config.launchers.Processes`. `modules`: imported once for all trials."""
        self.max_minutes = max_minutes
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*modules])
        os.environ.setdefault(*LOOKS_ONLY)
        forkserver.ensure_running()
        self.devices = Devices(found(self.context), parallel)
        self.running: list[Running] = []
        self.signals: list[int] = []
        self.next: Work | None = None
        """Of the first trial that waits: to compose its config takes a moment, in which another one runs."""

    def run(self, trials: Sequence[Trial], work: Callable[[Trial], Work], changed: Callable[[bool], None]) -> None:
        """Run the trials that wait. Returns when all have ended; raises Interrupted once a signal has ended those that
        ran.

        `changed` is called now and then, with whether a trial ended.
        """
        waiting, self.next = [trial for trial in trials if trial.state == "waiting"], None
        with handling(self._on_signal):
            while (waiting and not self.signals) or self.running:
                self._start_next(waiting, work)
                connection.wait([each.process.sentinel for each in self.running], timeout=LOOK_SECONDS)
                self._end_late()
                ended = [each for each in self.running if not each.process.is_alive()]
                for each in ended:
                    self._note_end(each)
                changed(bool(ended))
        if self.signals:
            raise Interrupted(self.signals[0])

    def _on_signal(self, number: int, frame: Any) -> None:
        """Pass a signal on to all that runs: the first one ends a trial after its step, the second at once, and the
        third one is SIGKILL.
        """
        self.signals.append(number)
        for each in self.running:
            each.send(number if len(self.signals) < 3 else signal.SIGKILL)

    def _start_next(self, waiting: list[Trial], work: Callable[[Trial], Work]) -> None:
        """Start trials in their order while there is room."""
        while waiting and not self.signals:
            try:
                self.next = self.next or work(waiting[0])
            except VlmtuneError as error:
                self._end(waiting.pop(0), error)
                continue
            count = self.devices.count(self.next.processes)
            if not self.devices.has_room(count):
                return
            self._start(waiting.pop(0), self.next.call, count)
            self.next = None

    def _start(self, trial: Trial, call: Callable[[], int], count: int) -> None:
        (trial.folder / "result.json").unlink(missing_ok=True)  # of an earlier start
        devices = self.devices.take(count)
        environment = self.devices.environment(devices, count)
        process = self.context.Process(target=child.begin, args=(call, trial.folder, environment))
        trial.state, trial.began = "running", time.monotonic()
        process.start()
        limit = float("inf") if self.max_minutes is None else 60 * self.max_minutes
        self.running.append(Running(trial, process, devices, trial.began + limit))
        for number in self.signals:  # that came meanwhile
            self.running[-1].send(number)

    def _end_late(self) -> None:
        """End trials whose time is over, as by a scheduler: SIGTERM, and SIGKILL after `PATIENCE`."""
        now = time.monotonic()
        for each in self.running:
            if each.kill_at is None and now >= each.deadline:
                each.kill_at = now + PATIENCE
                each.send(signal.SIGTERM)
            elif each.kill_at is not None and now >= each.kill_at:
                each.send(signal.SIGKILL)

    def _note_end(self, ended: Running) -> None:
        """Write the result that the trial could not write, and end what is left of its group if it was killed."""
        self.running.remove(ended)
        self.devices.give_back(ended.devices)
        trial, code = ended.trial, ended.process.exitcode
        if code < 0:
            ended.send(signal.SIGKILL)
        self._end(trial, self._missing(ended, code))
        ended.process.close()

    def _end(self, trial: Trial, error: BaseException | None) -> None:
        """Note how a trial ended: as `error` says, or as its own result does."""
        if error is not None:
            own = files.result(trial.folder) or {}
            trial.folder.mkdir(parents=True, exist_ok=True)
            runfolder.write_failure(trial.folder, error, memory=own.get("memory", {}))
        trial.state, trial.ended = files.state(trial.folder), time.monotonic()

    def _missing(self, ended: Running, code: int) -> BaseException | None:
        """What is to be its result; None where its own says how it ended."""
        status = files.state(ended.trial.folder)
        if ended.kill_at is not None and status != "completed":
            return TimeLimit(f"it took longer than hydra.launcher.max_minutes={self.max_minutes:g}")
        if status != "waiting":
            return None
        if self.signals and (code < 0 or code >= 128):
            return Interrupted(self.signals[0])
        if code < 0:
            return Killed(_killed_by(-code))
        return TrainingError(f"it ended with exit code {code}; see {ended.trial.folder / child.OUTPUT}")


def _killed_by(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"killed by signal {number}"
    return f"killed by {name} (signal {number})" + OUT_OF_MEMORY * (number == signal.SIGKILL)
