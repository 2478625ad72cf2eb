"""Hydra's launchers start the trials of a multirun, each in a process or a job of its own."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from vlmtune.errors import ConfigError, nearest, to_install

KEY = "hydra/launcher"
SUBMITIT = "submitit_"
OWN = "processes"


@dataclass
class Processes:
    """The keys of vlmtune's own launcher, `hydra.launcher.*`: each trial in a process group on this machine."""

    _target_: str = "hydra_plugins.vlmtune_launcher.ProcessesLauncher"
    parallel: int | None = None
    """Trials that run at once; null: one per GPU, or one on a CPU."""
    max_minutes: float | None = None
    """Time limit of each trial; null: none. A trial that reaches it saves a checkpoint and counts as failed."""
    retry_failed: bool = False
    """With resume: run the failed trials again."""
    keep_features: bool = False
    """Keep the features of frozen towers that the trials share when all trials have ended."""


ConfigStore.instance().store(group=KEY, name=OWN, node=Processes)


def check(composed: DictConfig, multirun: bool) -> None:
    """Raise ConfigError for a launcher that Hydra would ignore, or whose tasks would all be the same run."""
    name, launcher = composed.hydra.runtime.choices[KEY], composed.hydra.launcher
    subfolder = _unresolved(composed.hydra.sweep)["subdir"]
    if multirun and subfolder != "${hydra.job.num}":
        raise ConfigError(f"hydra.sweep.subdir={subfolder}: a trial's folder is its number; leave it out")
    if name == OWN:
        _check_own(composed, multirun)
    elif name != "basic":
        _check_other(name, launcher, multirun)


def _check_other(name: str, launcher: DictConfig, multirun: bool) -> None:
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


def is_own(composed: DictConfig) -> bool:
    """Whether the trials of a sweep are started by vlmtune itself."""
    return bool(composed.hydra.runtime.choices[KEY] == OWN)


def _check_own(composed: DictConfig, multirun: bool) -> None:
    given, usual = composed.hydra.launcher, vars(Processes())
    problems = []
    if not multirun:
        problems += [f"hydra.launcher.{key}: is for a sweep; add -m" for key in usual if given[key] != usual[key]]
    if given.parallel is not None and given.parallel < 1:
        problems.append(f"hydra.launcher.parallel={given.parallel}: must be at least 1, or null")
    if given.max_minutes is not None and not 0 < given.max_minutes < math.inf:
        problems.append(f"hydra.launcher.max_minutes={given.max_minutes}: must be above 0, or null")
    if problems:
        raise ConfigError(problems)


def _unresolved(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=False)


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
