"""Hydra's sweepers choose the values of a multirun's trials: a grid of all values, or Optuna's search."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from vlmtune.errors import ConfigError, nearest, to_install
from vlmtune.metrics import lower_is_better

KEY = "hydra/sweeper"
OPTUNA = "optuna"
SAMPLERS = ("tpe", "gp", "nsgaii", "random")
DIRECTIONS = ("maximize", "minimize")
COSTS = ("memory", "seconds")
"""Objectives that are no metric: the peak memory in bytes, and the seconds of training."""


@dataclass
class Optuna:
    """The keys of `hydra/sweeper=optuna`, `hydra.sweeper.*`."""

    _target_: str = "hydra_plugins.vlmtune_optuna.OptunaSweeper"
    params: dict[str, str] | None = None
    """What is searched, in Hydra's grammar: `a,b`, `choice(a,b)`, `range(1,9)`, `interval(0,1)`,
    `tag(log,interval(1e-5,1e-2))`. Keys of the command line are added, or take their place."""
    n_trials: int = 20
    """Trials in all, failed ones too, and those that an earlier command ran."""
    objectives: list[str] | None = None
    """Null: the first of task.metrics. Else keys of result.json's metrics (eval/loss), `memory` or `seconds`."""
    direction: Any = None
    """maximize or minimize, or a list of them for several objectives; null: less memory, seconds,
    loss and errors (cer, wer), more of everything else."""
    sampler: str = "tpe"
    """tpe, gp (better with few trials, slower with many), nsgaii (for several objectives and many trials) or random."""
    seed: int | None = 0
    """The same seed makes the same search, interrupted and resumed or not; null: another one each time."""
    storage: str | None = None
    """URL of a database; null: SQLite in the sweep's folder."""
    study_name: str = "search"
    """In the database."""


ConfigStore.instance().store(group=KEY, name=OPTUNA, node=Optuna)


def searches(composed: DictConfig) -> bool:
    """Whether Optuna chooses the trials' values."""
    return bool(composed.hydra.runtime.choices[KEY] == OPTUNA)


def check(composed: DictConfig, multirun: bool) -> None:
    """Raise ConfigError for settings of the search that can't work, all of them at once."""
    if not searches(composed):
        return
    given, problems = composed.hydra.sweeper, []
    if not multirun:
        problems.append(f"{KEY}={OPTUNA}: is for a sweep; add -m")
    if importlib.util.find_spec("optuna") is None:
        problems.append(f"{KEY}={OPTUNA}: needs the package optuna: {to_install('optuna')}")
    if given.n_trials < 1:
        problems.append(f"hydra.sweeper.n_trials={given.n_trials}: must be at least 1")
    if given.sampler not in SAMPLERS:
        problems.append(f"hydra.sweeper.sampler={given.sampler}: {nearest(str(given.sampler), SAMPLERS)}")
    if given.sampler == "gp" and importlib.util.find_spec("scipy") is None:
        problems.append(f"hydra.sweeper.sampler=gp: needs the package scipy: {to_install('scipy')}")
    if given.storage is not None and given.study_name == Optuna.study_name:
        problems.append("hydra.sweeper.study_name: a database of your own needs a name for each study")
    problems += _of_objectives(given)
    if problems:
        raise ConfigError(problems)


def _of_objectives(given: DictConfig) -> list[str]:
    wrong = [name for name in given.objectives or [] if name not in COSTS and not re.match(r"(eval|test)/", name)]
    problems = [
        f"hydra.sweeper.objectives: {name}: write {' or '.join(COSTS)}, or a metric with its split: eval/{name}"
        for name in wrong
    ]
    if given.objectives is not None and not given.objectives:
        problems.append("hydra.sweeper.objectives: is empty; null means the first of task.metrics")
    if given.direction is None:
        return problems
    chosen = [given.direction] if isinstance(given.direction, str) else list(given.direction)
    problems += [
        f"hydra.sweeper.direction: {each}: {nearest(str(each), DIRECTIONS)}"
        for each in chosen
        if each not in DIRECTIONS
    ]
    if len(chosen) != (count := len(given.objectives or [None])):
        problems.append(f"hydra.sweeper.direction: {len(chosen)} for {count} objectives")
    return problems


def directions(settings: Optuna, metric: str) -> list[str]:
    """maximize or minimize for each objective. `metric`: the first of task.metrics, the objective if none is named."""
    if settings.direction is not None:
        return [settings.direction] if isinstance(settings.direction, str) else list(settings.direction)
    return [
        "minimize" if name in COSTS or lower_is_better(name) else "maximize" for name in settings.objectives or [metric]
    ]
