"""A run in the workers of Ray Train, started again where one is lost. Only a run with backend=ray imports this module.

Ray runs the workers and decides when to start them; that a run goes on from its last checkpoint, and ends after its
step, is the run's own work in its folder, as under any other launcher.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from vlmtune.commands import import_path
from vlmtune.config.schema import BackendConfig
from vlmtune.display import Followed
from vlmtune.errors import ConfigError, LostProcess, TrainingError, VlmtuneError
from vlmtune.launch import lock, signals
from vlmtune.launch.session import TIMEOUT

RESIZE_SECONDS = 60.0
"""How often Ray looks whether the cluster has room for another number of workers."""
LOOK_SECONDS = 0.2
"""How often this process looks for news of the run."""
OWN_FILES = ".ray"
"""Ray's files in the run folder."""


def run(work: Callable[[dict[str, Any]], Any], settings: dict[str, Any], folder: Path, backend: BackendConfig) -> Any:
    """Call `work(settings)` in each worker, and show what the first one logs to the run `folder`; returns its value.

    A signal to this process ends the run after its step; a second one, or one while no worker is at work, ends it at
    once. Raises VlmtuneError as a worker raised it, TrainingError where Ray gave up, signals.Interrupted.
    """
    (folder / signals.STOP_FILE).unlink(missing_ok=True)  # of a process that was killed
    try:
        with signals.handling(Asking(folder)), _connected(backend):
            trainer = TorchTrainer(
                work,
                train_loop_config=settings,
                torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
                scaling_config=scaling(backend),
                run_config=run_config(backend, folder),
            )
            return _followed(trainer.fit, folder).return_value
    except TrainingFailedError as error:
        raise _explained(error, folder) from error
    finally:
        (folder / signals.STOP_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / OWN_FILES, ignore_errors=True)


def scaling(backend: BackendConfig) -> ScalingConfig:
    """How many workers Ray starts, and what each reserves."""
    count = backend.num_workers
    return ScalingConfig(
        num_workers=tuple(count) if isinstance(count, list) else count,
        use_gpu=backend.use_gpu,
        resources_per_worker=dict(backend.resources_per_worker) or None,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def run_config(backend: BackendConfig, folder: Path) -> RunConfig:
    """Where Ray keeps its own files, and how often it starts the workers again."""
    storage = backend.storage or folder / OWN_FILES
    return RunConfig(
        name=folder.name,
        storage_path=str(storage) if "://" in str(storage) else str(Path(storage).expanduser().absolute()),
        failure_config=FailureConfig(
            max_failures=backend.max_failures, max_preemption_failures=backend.max_preemptions
        ),
        callbacks=[Mistakes()],
    )


def connection(backend: BackendConfig) -> dict[str, Any]:
    """What `ray.init` is told: which cluster, and that its own output is not for this terminal."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    found = {"address": backend.address} if backend.address else {"address": "local", "include_dashboard": False}
    return {**found, **quiet, "runtime_env": {"env_vars": {"PYTHONPATH": import_path()}}}


class Mistakes(UserCallback):  # type: ignore[misc]
    """Ends the run where a worker met what the user has to put right: started again, it would only meet it again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            error = worker_exceptions[rank]
            if isinstance(error, VlmtuneError) and not isinstance(error, LostProcess):
                raise error


class Asking:
    """A handler of signals that asks the run in `folder` to end after its step.

    Raises Interrupted at the second signal, and at the first one while no worker is at work: Ray waits, or starts them.
    """

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked or not self._at_work():
            raise signals.Interrupted(number)
        self.asked = True
        signals.ask_to_stop(self.folder, number)

    def _at_work(self) -> bool:
        try:
            lock.check(self.folder)
        except ConfigError:
            return True
        return False


@contextmanager
def _connected(backend: BackendConfig) -> Iterator[None]:
    """Connected to Ray while inside: to the cluster of `backend.address`, or to one that is started for it.

    A connection that the caller has open is used, and left open. Raises ConfigError.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**connection(backend))
    except (ConnectionError, RuntimeError, ValueError) as error:
        at = f"backend.address={backend.address}: no Ray is reached there"
        raise ConfigError(f"{at if backend.address else 'backend=ray: Ray does not start here'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own
    try:
        if not backend.address:
            _check_room(backend)
        yield
    finally:
        ray.shutdown()


def _check_room(backend: BackendConfig) -> None:
    """Raise ConfigError where a Ray of this machine alone has no room for the workers: it would wait for ever."""
    least, has = scaling(backend).min_workers, ray.cluster_resources()
    for name, needed in scaling(replace(backend, num_workers=least)).total_resources.items():
        if needed > has.get(name, 0):
            raise ConfigError(
                f"backend.num_workers={least}: these workers reserve {name}: {needed:g}, and this machine has "
                f"{has.get(name, 0):g}; start fewer, let each reserve less (backend.resources_per_worker), or set "
                "backend.address to that of a cluster"
            )


def _followed(fit: Callable[[], Any], folder: Path) -> Any:
    """What `fit` returns, with what the run logs shown meanwhile.

    It runs in a thread: in the main thread, Ray would end the workers at a Ctrl-C without notice.
    """
    log, result = Followed(folder / "train.log"), concurrent.futures.Future[Any]()

    def work() -> None:
        try:
            result.set_result(fit())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while not result.done():
        concurrent.futures.wait([result], timeout=LOOK_SECONDS)
        log.show()
    return result.result()


def _explained(error: TrainingFailedError, folder: Path) -> Exception:
    """The error of a worker that a user has to put right, or one that says why Ray gave up."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, VlmtuneError):
        return cause
    lost = getattr(error, "worker_failures", {})
    reasons = [f"rank {rank}: {type(each).__name__}: {str(each).strip()}" for rank, each in sorted(lost.items())]
    end = "a worker failed, and no restart is left (backend.max_failures)" if lost else f"Ray ended the run: {error}"
    return TrainingError([f"{end}; to go on from the last checkpoint: resume={folder}", *reasons])
