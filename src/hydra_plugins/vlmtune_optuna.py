"""The sweeper that Hydra finds by the name of this package; all it does is in vlmtune."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """`hydra/sweeper=optuna`: Optuna chooses the values of each trial. Only for vlmtune's train."""

    def __init__(self, **settings: Any):
        """`settings`: the keys of `vlmtune.config.sweepers.Optuna`, which are read from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from vlmtune.trials import search

        search.search(self.config, arguments, self.launcher.launch)
