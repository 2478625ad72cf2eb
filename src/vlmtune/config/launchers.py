"""Hydra's launchers start the trials of a multirun, each in a process or a job of its own."""

from __future__ import annotations

import re
import shutil

from omegaconf import DictConfig

from vlmtune.errors import ConfigError, nearest, to_install

KEY = "hydra/launcher"
SUBMITIT = "submitit_"


def check(composed: DictConfig, multirun: bool) -> None:
    """Raise ConfigError for a launcher that Hydra would ignore, or whose tasks would all be the same run."""
    name, launcher = composed.hydra.runtime.choices[KEY], composed.hydra.launcher
    if name == "basic":
        return
    if not multirun:
        raise ConfigError(
            f"{KEY}={name}: starts the trials of a multirun; add -m (a single run is then trial 0 of hydra.sweep.dir)"
        )
    for key in ("tasks_per_node", "nodes"):
        if launcher.get(key, 1) != 1:
            raise ConfigError(
                f"hydra.launcher.{key}={launcher[key]}: each task would be a run of its own; leave it at 1. Several "
                "GPUs of one machine need backend=accelerate, several machines sbatch and torchrun"
            )


def check_machine(composed: DictConfig) -> None:
    """Raise ConfigError where jobs can't be submitted to SLURM."""
    name = composed.hydra.runtime.choices[KEY]
    if name == f"{SUBMITIT}slurm" and (missing := [tool for tool in ("sbatch", "srun") if not shutil.which(tool)]):
        raise ConfigError(
            f"{KEY}={name}: this machine has no {' and no '.join(missing)}; submit from a machine of the cluster, or "
            f"use {KEY}={SUBMITIT}local"
        )


def not_found(message: str) -> str | None:
    """What to do about a launcher that Hydra does not find, from its message; None if it is about something else."""
    name = re.search(rf"Could not find '{KEY}/(\S+)'", message)
    if name is None:
        return None
    found = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
    if name[1].startswith(SUBMITIT) and not any(option.startswith(SUBMITIT) for option in found):
        return f"{KEY}={name[1]}: needs hydra-submitit-launcher: {to_install('hydra-submitit-launcher')}"
    return f"{KEY}={name[1]}: {nearest(name[1], found)}"
