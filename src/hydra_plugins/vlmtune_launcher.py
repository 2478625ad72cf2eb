"""The launcher that Hydra finds by the name of this package; all it does is in vlmtune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessesLauncher(Launcher):
    """`hydra/launcher=processes`: each trial of a sweep in a process group of its own. Only for vlmtune's train."""

    def __init__(self, **settings: Any):
        """`settings`: the keys of `vlmtune.config.launchers.Processes`, which are read from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.job, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from vlmtune.cli import sweeps

        return sweeps.launch(self.job, self.context, self.config, job_overrides, initial_job_idx)
