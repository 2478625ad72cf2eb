"""A run folder belongs to one run: nothing overwrites another's, and whatever ends a run leaves a result.json."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from vlmtune import display, durable
from vlmtune.config import saved
from vlmtune.config.schema import AUTO, Config, plain
from vlmtune.config.strict import strict
from vlmtune.errors import ConfigError, VlmtuneError, storage_advice
from vlmtune.launch import lock, ranks, scheduler, signals, steps
from vlmtune.launch.world import World
from vlmtune.memory import memory_advice


def check_free(folder: Path, config: Config) -> None:
    """Raise ConfigError where a running process uses the folder, or where it holds a run that this one does not resume.

    A run that failed or was killed before it saved anything is no obstacle, nor is one that this job has begun.
    """
    lock.check(Path(config.resumed_folder).expanduser() if config.resumed_folder else folder)
    if not config.resume and not _is_restart(folder):
        _refuse_another(folder)


def _refuse_another(folder: Path) -> None:
    """Raise ConfigError if the folder holds a run that saved something or is complete."""
    from vlmtune.record.runfolder import read_result

    if not (folder / "config.yaml").exists():
        return
    killed = "killed" if (folder / lock.NAME).exists() else None  # a run of ours that nothing runs any more
    status = (read_result(folder) or {"status": killed})["status"]
    kept = [*durable.names(folder / "checkpoints"), *({"model"} & {*durable.names(folder)})]
    if kept or status not in ("failed", "interrupted", "preflight", "killed"):
        raise ConfigError(f"{folder}: holds a run already; choose another hydra.run.dir, or resume it: resume={folder}")


def _is_restart(folder: Path) -> bool:
    """Whether a scheduler started the job again that began the run in the folder."""
    try:
        job = json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):  # it had not come far, or is no run of ours
        return False
    return scheduler.is_restart_of(job)


@contextmanager
def held(folder: Path, config: Config, world: World) -> Iterator[None]:
    """Hold the folder while inside, log into it, and write down what ends the run early. Raises ConfigError."""
    with storage_advice():
        check_free(folder, config)
        if not config.resume and _is_restart(folder):
            config.resume = AUTO
        if config.resume:
            saved.refuse_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with lock.held(folder):
            _prepare(folder, config, world)
            # Ray may start the run again: what ended it is written down where that is known
            written = nullcontext() if config.backend.name == "ray" else failure_written(folder, world)
            with signals.ending_at_once(), display.logging_to(folder), written:
                yield


def _prepare(folder: Path, config: Config, world: World) -> None:
    """Finish what a killed process left half done, decide what `resume=auto` means here, and fix the step size.

    A new run starts in a clean folder.
    """
    from vlmtune.record import runfolder

    for parent in (folder, folder / "checkpoints"):
        durable.repair_all(parent)
    if config.resume == AUTO and own_result(folder, config) is None:
        _resume_or_start(folder, config)
    if config.resume != AUTO:  # else nothing is left to do
        steps.fix(config, world.processes)
    if config.resume:  # the files of a resumed run are touched once it is known to be the same run
        return
    if (folder / "base").exists():  # of a start that failed, perhaps with another seed
        durable.remove(folder / "base")
    runfolder.write_config(folder / "config.yaml", config)
    for left_over in ("quarantine.csv", "result.json"):
        (folder / left_over).unlink(missing_ok=True)


def _resume_or_start(folder: Path, config: Config) -> None:
    """Set `config.resume` to the folder if it has a checkpoint, else to null. Raises ConfigError for another run's."""
    saved_steps = [name for name in durable.names(folder / "checkpoints") if name.removeprefix("step_").isdigit()]
    own = _is_of(folder, config)
    config.resume = str(folder) if saved_steps else None
    if own or saved_steps:
        steps.keep(config.trainer, _config_in(folder).trainer)
    else:
        _refuse_another(folder)


def own_result(folder: Path, config: Config) -> dict[str, Any] | None:
    """With `resume=auto`: the result of this very run if it is complete, so that nothing is left to do."""
    from vlmtune.record.runfolder import read_result

    result = read_result(folder) if config.resume == AUTO and _is_of(folder, config) else None
    return result if result is not None and result["status"] == "completed" else None


def _is_of(folder: Path, config: Config) -> bool:
    """Whether the folder holds a run of this config, which may leave the step size open."""
    from vlmtune.record.runfolder import absolute

    if not (folder / "config.yaml").exists():
        return False
    before, now = _config_in(folder), copy.deepcopy(absolute(config))
    steps.keep(now.trainer, before.trainer)
    free = {"resume": None, "backend": None}  # neither decides what is computed
    return {**plain(before), **free} == {**plain(now), **free}


def _config_in(folder: Path) -> Config:
    return strict(saved.read(folder / "config.yaml"))


@contextmanager
def failure_written(folder: Path, world: World) -> Iterator[None]:
    """What ends a run early becomes its result.json, unless one stands there already."""
    from vlmtune.data.bad_rows import BadRowsError, write_quarantine
    from vlmtune.record import runfolder

    try:
        with memory_advice(), storage_advice():
            yield
    except BaseException as raised:
        with signals.StopRequest().watching():  # where another rank failed, the launcher's signal comes just now
            error = first_error(raised, world)
            with suppress(OSError):  # on a full disk the error itself matters more
                if isinstance(error, BadRowsError):
                    write_quarantine(folder / "quarantine.csv", error.bad)
                if not (folder / "result.json").exists():
                    runfolder.write_failure(folder, error)
        if error is raised:
            raise
        raise error from raised


def first_error(error: BaseException, world: World) -> BaseException:
    """Where another rank failed first, its error in place of the connection that broke, or of the launcher's signal."""
    follows = isinstance(error, Exception | signals.Interrupted) and not isinstance(error, VlmtuneError)
    if not follows or world.is_alone:
        return error
    return ranks.cause(error, world) or error
