"""A search with Optuna (`hydra/sweeper=optuna`): it proposes trials, Hydra's launcher runs them, their result.json
says how good they were.

The study is in a database from the first trial on. A trial has the same number there and as a folder. One that a killed
command left behind is RUNNING there: its values are known, so it goes on in its folder.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vlmtune import display
from vlmtune.config import sweepers, trial_names
from vlmtune.errors import CheckpointError
from vlmtune.record import environment, runfolder
from vlmtune.trials import devices, space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import Trial

Launch = Callable[..., Any]
"""Hydra's `Launcher.launch(overrides of each trial, initial_job_idx=number of the first)`."""
REPEATS = "repeats"
"""Of a trial: the number of the failed one that it repeats."""
RESULTS = "optimization_results.yaml"
"""What Hydra's sweepers call the file with the best values."""


def search(config: DictConfig, arguments: Sequence[str], launch: Launch) -> None:
    """Run trials until the study has as many as `hydra.sweeper.n_trials`, and write down which one was best.

    `arguments`: the overrides of the command line. Raises ConfigError before anything is written.
    """
    settings, folder = _settings(config), Path(config.hydra.sweep.dir).absolute()
    distributions, fixed = space.split(settings.params, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(settings, folder, config.task.metrics[0])
    at_once = _at_once(config.hydra.launcher)
    if config.hydra.launcher.get("retry_failed"):
        _repeat_failed(study)
    while batch := _next(study, settings, at_once):
        for trial in batch:
            for key, distribution in distributions.items():
                trial._suggest(key, distribution)  # as Hydra's own plugin for Optuna does
        for first, group in _in_a_row(batch):
            overrides = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in group]
            launch(overrides, initial_job_idx=first)
        for trial in batch:
            _tell(study, trial.number, _values(folder / str(trial.number), settings.objectives))
    _write_best(study, folder, settings)


def _settings(config: DictConfig) -> sweepers.Optuna:
    given = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    assert isinstance(given, dict)
    return sweepers.Optuna(**{str(key): value for key, value in given.items()})


def _study(settings: sweepers.Optuna, folder: Path, metric: str) -> Study:
    """The study of this sweep, or a new one. `metric`: the first of task.metrics."""
    import optuna
    from sqlalchemy import URL

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = settings.storage or URL.create("sqlite", database=str(folder / "study.db")).render_as_string()
    return optuna.create_study(
        storage=storage,
        study_name=settings.study_name,
        directions=sweepers.directions(settings, metric),  # type: ignore[arg-type]  # checked in config.sweepers
        load_if_exists=True,
    )


def _at_once(launcher: DictConfig) -> int:
    """How many trials the launcher runs at the same time."""
    if "parallel" not in launcher:
        return 1
    return launcher.parallel or max(len(devices.found(multiprocessing.get_context("spawn"))), 1)


def _sampler(settings: sweepers.Optuna, drawn: int) -> BaseSampler:
    """The sampler after `drawn` trials. Its random numbers follow from seed and trials alone, so that a resumed search
    does not draw its first values again, but what it would have drawn.
    """
    import numpy as np
    from optuna import samplers

    seed = None if settings.seed is None else int(np.random.SeedSequence((settings.seed, drawn)).generate_state(1)[0])
    if settings.sampler == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=True)  # or trials that run at once would be alike
    kinds = {"gp": samplers.GPSampler, "nsgaii": samplers.NSGAIISampler, "random": samplers.RandomSampler}
    return kinds[settings.sampler](seed=seed)


def _next(study: Study, settings: sweepers.Optuna, at_once: int) -> list[Trial]:
    """The trials to run now: first those that an earlier command left behind; none when there are enough."""
    from optuna.trial import Trial, TrialState

    trials = study.get_trials(deepcopy=False)
    study.sampler = _sampler(settings, len(trials))
    left = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if left:
        return [Trial(study, trial._trial_id) for trial in left]
    repeated = sum(REPEATS in trial.user_attrs for trial in trials)
    begun = sum(trial.state != TrialState.WAITING for trial in trials)
    return [study.ask() for _ in range(min(at_once, settings.n_trials + repeated - begun))]


def _repeat_failed(study: Study) -> None:
    """Queue each failed trial once more, as a new trial: a study keeps what it has."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs.get(REPEATS) for trial in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in repeated:
            study.enqueue_trial(trial.params, user_attrs={REPEATS: trial.number})


def _in_a_row(trials: Sequence[Trial]) -> Iterator[tuple[int, list[Trial]]]:
    """The trials in groups of consecutive numbers, each with its first number, as a launcher takes them."""
    for _, group in groupby(enumerate(trials), lambda pair: pair[1].number - pair[0]):
        found = [trial for _, trial in group]
        yield found[0].number, found


def _values(folder: Path, objectives: Sequence[str] | None) -> list[float] | None:
    """What the trial in `folder` reached; None where it did not complete, or lacks an objective."""
    try:
        result = runfolder.read_result(folder)
    except CheckpointError:
        return None
    if result is None or result["status"] != "completed":
        return None
    memory = result["memory"]
    known = result["metrics"] | {
        "memory": environment.peak_bytes(memory),
        "seconds": result["speed"]["training_seconds"],
    }
    found = [result["objective"]] if objectives is None else [known.get(name) for name in objectives]
    return None if None in found else [float(value) for value in found]


def _tell(study: Study, number: int, values: list[float] | None) -> None:
    """A failed trial does not end the search; Optuna's samplers leave it out."""
    from optuna.trial import TrialState

    study.tell(number, values, state=TrialState.FAIL if values is None else TrialState.COMPLETE)


def _write_best(study: Study, folder: Path, settings: sweepers.Optuna) -> None:
    """Show the best trial, or with several objectives those that no other one beats in all, and write them down."""
    goals = settings.objectives or ["objective"]
    best = study.best_trials if len(goals) > 1 else study.best_trials[:1]  # the first of equals
    title = f"search: {len(study.trials)} trials"
    if not best:
        display.say(f"{title}, none of them completed")
        return
    lines = []
    for trial in best:
        values = "  ".join(f"{goal} {value:.4g}" for goal, value in zip(goals, trial.values, strict=True))
        label = trial_names.trial_name([f"{key}={value}" for key, value in trial.params.items()])
        lines.append(f"  {trial.number}  {values}  {label}")
    display.say("\n".join([f"{title}; best:" if len(goals) == 1 else f"{title}; no other is better in all:", *lines]))
    found = [{"trial": trial.number, "params": _plain(trial.params), "values": list(trial.values)} for trial in best]
    if len(goals) == 1:
        result = {"name": "optuna", "best_trial": best[0].number, "best_params": found[0]["params"]}
        result["best_value"] = best[0].values[0]
    else:
        result = {"name": "optuna", "objectives": goals, "solutions": found}
    runfolder.write_whole(folder / RESULTS, yaml.safe_dump(result, sort_keys=False))


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    return {key.lstrip("+"): value for key, value in params.items()}
