"""Fine-tune a vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune import backends
from vlmtune.cli.words import overrides_given
from vlmtune.config import compose, launchers, paths, sweepers
from vlmtune.config.schema import AUTO
from vlmtune.launch import processes
from vlmtune.launch.world import World
from vlmtune.record import guard
from vlmtune.trials import files, space


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    config, composed = compose.read("train", overrides, multirun=multirun)
    launchers.check_machine(composed)
    processes.to_start(config.backend, world)
    if world.is_main:
        folder = composed.hydra.sweep.dir if multirun else config.resumed_folder or composed.hydra.run.dir
        paths.check_writable(Path(folder))
        if multirun:
            files.check_free(Path(folder), resumed=config.resume == AUTO)
    if not multirun and world.is_main:
        guard.check_free(Path(composed.hydra.run.dir), config)
    elif swept := composed.hydra.sweeper.get("params"):
        compose.read("train", [*(f"{key}={values}" for key, values in swept.items()), *overrides], multirun=True)
    if multirun and sweepers.searches(composed):
        space.split(composed.hydra.sweeper.params, compose.normalise(overrides)[0])


def job(composed: Any, world: World) -> int:
    """Train one run; returns the exit code."""
    from hydra.core.hydra_config import HydraConfig

    from vlmtune.config.strict import strict

    config = strict(compose.of_run(composed, overrides_given("train")))
    folder = Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path()
    if (count := processes.to_start(config.backend, world)) > 1:
        return backends.run_processes(overrides_given("train"), folder, count)
    result = backends.run_in(folder, config, world)
    return 128 + result["signal"] if result["status"] == "interrupted" else 0
