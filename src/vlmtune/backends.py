"""Where a run happens: in this process, in others that are started for it, or in Ray's workers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune.config.schema import AUTO, Config, plain
from vlmtune.errors import ConfigError, of_kind
from vlmtune.launch import processes
from vlmtune.launch.world import ALONE, World
from vlmtune.memory import memory_advice

log = logging.getLogger("vlmtune")
COMPLETE = "this run is complete, nothing is left to do"


def in_processes(overrides: Sequence[str], folder: Path, count: int) -> dict[str, Any]:
    """As `run_in`, in processes that are started for it. Raises the error that ended the run."""
    from vlmtune.record.runfolder import read_result

    before = _written(folder / "result.json")
    code = run_processes(overrides, folder, count)
    result = read_result(folder)
    if result is None or result["status"] == "failed" or code not in (0, 128 + result.get("signal", 0)):
        found = {"type": "", "message": f"exit code {code}; see the output above"}
        if result is not None and _written(folder / "result.json") != before:  # else it is of an earlier start
            found = result["error"] or found
        raise of_kind(found["type"], [found["message"]])
    return result


def _written(file: Path) -> int | None:
    """When a file was written, in nanoseconds; None where there is none."""
    return file.stat().st_mtime_ns if file.exists() else None


def run_processes(overrides: Sequence[str], folder: Path, count: int) -> int:
    """Train in `folder` as so many processes. Returns the exit code; raises TrainingError where no process could tell
    what went wrong, which is then in result.json too.
    """
    from vlmtune.commands import started
    from vlmtune.config import paths
    from vlmtune.record import guard

    with guard.failure_written(folder, ALONE):
        place = f"hydra.run.dir={paths.quoted(str(folder.absolute()))}"
        return processes.run([*started("train"), *overrides, place], count)


LEFT_ALONE = (
    "accelerate launch was asked for several processes and started this one only, as it does where it finds no GPUs. "
    "Several processes: backend=accelerate backend.num_processes=N without it, or torchrun --nproc_per_node N"
)


def run_in(folder: Path, config: Config, world: World = ALONE) -> dict[str, Any]:
    """Run `config` in `folder`, and write a result.json there whatever happens.

    Raises ConfigError if the folder holds another run, and any error that ends the run early: with several processes
    the error of the process that failed first.
    """
    return _on_ray(folder, config) if config.backend.name == "ray" else _run_here(folder, config, world)


def _on_ray(folder: Path, config: Config) -> dict[str, Any]:
    """As `run_in`, in Ray's workers. They go on from the folder's last checkpoint whenever Ray starts them again."""
    from vlmtune import display
    from vlmtune.launch import lock, on_ray, signals
    from vlmtune.record import guard, runfolder

    guard.check_free(folder, config)
    if (complete := guard.own_result(folder, config)) is not None:
        display.say(f"{folder}: {COMPLETE}")
        return complete
    config, folder = runfolder.absolute(config), folder.absolute()
    config.resume = str(folder) if config.resumed_folder else AUTO
    folder.mkdir(parents=True, exist_ok=True)
    # the run itself holds the folder only while its workers are at work, not while Ray starts them or waits for room
    with lock.held(folder / on_ray.OWN_FILES), guard.failure_written(folder, ALONE):
        ended = on_ray.run(_in_worker, {"folder": str(folder), "config": plain(config)}, folder, config.backend)
        if isinstance(ended, int):
            raise signals.Interrupted(ended)
    return dict(ended)


def _in_worker(settings: dict[str, Any]) -> dict[str, Any] | int:
    """The run in one of Ray's workers: its result, or the number of the signal that ended it before its first step."""
    from vlmtune.config.strict import literal, strict
    from vlmtune.launch import lock
    from vlmtune.launch.signals import Interrupted

    folder, world = Path(settings["folder"]), World.from_environment()
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: this worker's machine does not have it; choose a shared disk: hydra.run.dir=FOLDER"
        )
    if world.is_main:
        lock.wait(folder)  # which the first rank of an earlier start may hold a little longer
    try:
        return _run_here(folder, strict(OmegaConf.create(literal(settings["config"]))), world)
    except Interrupted as stopped:
        return stopped.number


def _run_here(folder: Path, config: Config, world: World) -> dict[str, Any]:
    """As `run_in`, in this process."""
    from vlmtune.display import logging_to
    from vlmtune.launch import ranks, signals, surroundings
    from vlmtune.record import environment, guard, tracking

    environment.PEAK.start()
    tracking.check(config.tracker)
    with surroundings.kept(), ranks.closed_at_exit(world):
        if not world.is_main:
            with signals.ending_at_once(), logging_to(None, other_rank=True), ranks.reporting(world):
                return _trained(config, None)
        with guard.held(folder, config, world):
            if world.left_alone:
                log.warning(LEFT_ALONE)
            complete = guard.own_result(folder, config)
            if complete is not None and world.is_alone:
                log.info("%s: %s", folder, COMPLETE)
                return complete
            result = _run_held(folder, config)
            return complete or result


def _run_held(folder: Path, config: Config) -> dict[str, Any]:
    """As `run_in`, on the first rank, in a folder that no other process uses."""
    from vlmtune.record import runfolder

    result = _trained(config, folder)
    gc.collect()  # libraries leave reference cycles (torch.fx, to the frame that imported it) that keep the model alive
    if config.preflight == "only" and not config.resume:  # else the checked run would lose its own result
        runfolder.write_json(folder / "result.json", result)
    return result


def _trained(config: Config, folder: Path | None) -> dict[str, Any]:
    """One run: from rows to a fine-tuned model in `folder`, which is None on processes other than the first."""
    with memory_advice(config.saves_memory):
        return _built_and_fitted(config, folder)


def _built_and_fitted(config: Config, folder: Path | None) -> dict[str, Any]:
    from vlmtune.data import table
    from vlmtune.record import slices

    splits = table.load(config.data, config.task, config.trainer.seed)  # checked before anything heavy is imported
    for name in sorted({"validation", "test"} & splits.keys()):
        slices.check(splits[name], config)
    if config.trainer.best_metric and "validation" not in splits:
        raise ConfigError("trainer.best_metric: needs rows to evaluate; set data.validation(_fraction)")
    log.info("fine-tuning %s for %s", config.model.name, config.task.name)
    from vlmtune.launch.session import Complete
    from vlmtune.run import build, fit

    try:
        built = build(config, splits, folder)
    except Complete:
        return {"status": "completed"}
    if config.preflight == "only":
        return {"status": "preflight", "steps": 0}
    return fit(built)
