"""The sweeps of `train -m`: what Hydra makes of the command line becomes trials, and their ends its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vlmtune.cli import resumed, train
from vlmtune.cli.ending import guard, leave
from vlmtune.config import compose, launchers, paths, trial_names
from vlmtune.config.launchers import Processes
from vlmtune.config.schema import TrackerConfig
from vlmtune.errors import ConfigError
from vlmtune.launch.world import ALONE, World
from vlmtune.trials import files, submitted, sweep
from vlmtune.trials.running import Work
from vlmtune.trials.trial import Trial

PRELOAD = "vlmtune.cli.preload"


class Job:
    """What Hydra calls with each config that it composed, here or in a job that its launcher started elsewhere. It
    collects exit codes.
    """

    def __init__(self, work: Any, world: World):
        """`work(composed, world) -> exit code`: a command's job."""
        self.work, self.world, self.codes, self.place = work, world, list[int](), submitted.place()
        self.sweep: sweep.Sweep | None = None
        """The trials of vlmtune's own launcher."""
        self.stack = ExitStack()

    def __call__(self, composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        code = guard(lambda: self.work(composed, self.world))
        self.codes.append(code)
        if submitted.place() != self.place:  # `codes` is a copy
            submitted.check(code, Path(HydraConfig.get().runtime.output_dir))
        elif code >= 128:  # a signal is for the whole sweep
            leave(code)

    def code(self) -> int:
        """The exit code of the command."""
        codes = self.codes if self.sweep is None else self.sweep.finish()
        return max(codes, default=0)


class Elsewhere(Callback):  # type: ignore[misc]  # Hydra has no types
    """Hydra tells it when a sweep begins: one of another launcher gets the same files and last lines as ours has."""

    finishing: ClassVar[ExitStack] = ExitStack()
    """What is left to do. Hydra makes the object, and ends without a word to it where a trial fails."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not launchers.is_own(config):
            found, keys = self.finishing.enter_context(_opened(config, Processes())), _keys(config)
            found.record()
            self.finishing.callback(found.finish)
            self.finishing.callback(found.collect, lambda overrides: _described(overrides, keys))


def launch(job: Job, context: Any, config: DictConfig, overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
    """Run trials with these `overrides`, the number of the first one being `first`, and return Hydra's `JobReturn`s.

    `return_value`: the objective of a completed trial, else None: one that failed must not end a search. A search
    begins a batch of trials at each call.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from hydra.errors import HydraException

    if job.sweep is None:
        settings = Processes(**{key: value for key, value in config.hydra.launcher.items() if key != "_target_"})
        job.sweep = job.stack.enter_context(_opened(config, settings))
    keys = _keys(config)
    full = dict(enumerate(map(list, overrides), first))
    trials = [job.sweep.add(number, *_described(full[number], keys)) for number in full]

    def work(trial: Trial) -> Work:
        try:
            return _work(context, config, full[trial.number], trial)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error).strip().splitlines()[0]) from error

    modules = ["wandb"] if config.tracker.name == "wandb" else []
    job.sweep.run(trials, work, [PRELOAD, *modules])
    return [
        JobReturn(
            overrides=trial.overrides,
            working_dir=str(trial.folder),
            task_name=config.hydra.job.name,
            status=JobStatus.COMPLETED,
            _return_value=files.objective(trial.folder),
        )
        for trial in trials
    ]


def _opened(config: DictConfig, settings: Processes) -> Any:
    """The sweep that Hydra composed, held by this command."""
    hydra, folder = config.hydra, Path(config.hydra.sweep.dir).absolute()
    chosen = [text for text in hydra.overrides.hydra if not text.startswith(("hydra.mode=", "hydra.sweep.dir="))]
    given = resumed.without([*hydra.overrides.task, *chosen])
    name = sweep_name(hydra.runtime.choices.get("sweeps"), hydra.overrides.task, hydra.sweeper.get("params"))
    return sweep.opened(folder, name, config.task.metrics[0], given, settings, TrackerConfig(**config.tracker))


def _keys(config: DictConfig) -> list[str]:
    return swept_keys(config.hydra.overrides.task, config.hydra.sweeper.get("params"))


def _described(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """A trial's overrides as they are recorded, and those of them that are swept."""
    own = resumed.without(overrides)
    return own, [override for override in own if override.partition("=")[0] in keys]


def _work(context: Any, config: DictConfig, overrides: list[str], trial: Trial) -> Work:
    """What a trial's process does: its config is composed here, as Hydra has everything open."""
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = trial.number
        composed.hydra.sweep.dir, composed.hydra.sweep.subdir = str(trial.folder.parent), str(trial.number)
        if composed.data.cache_features == "auto" and composed.data.cache_folder is None:
            composed.data.cache_folder = str(trial.folder.parent / sweep.FEATURES)
            composed.hydra.overrides.task.append(f"++data.cache_folder={paths.quoted(composed.data.cache_folder)}")
    return Work(partial(work_of, composed), _processes(composed.backend))


def _processes(backend: DictConfig) -> int | None:
    """How many processes, each with a GPU, a trial takes on this machine; None: as many as there are GPUs."""
    if backend.name == "accelerate":
        return backend.num_processes
    if backend.name == "ray":
        count = backend.num_workers[-1] if isinstance(backend.num_workers, ListConfig) else backend.num_workers
        return count if backend.use_gpu and not backend.address else 0
    return 1


def work_of(composed: DictConfig) -> int:
    """In a trial's process: what Hydra's own launcher would do in the process of the command. Returns the exit code."""
    from hydra import version
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job, setup_globals
    from hydra.types import HydraContext

    version.setbase(compose.VERSION_BASE)
    setup_globals()
    job = Job(_train, ALONE)
    context = HydraContext(config_loader=None, callbacks=Callbacks(composed))
    keys = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
    run_job(hydra_context=context, task_function=job, config=composed, **keys)
    return job.code()


def _train(composed: Any, world: World) -> int:
    """A trial; one that can't even begin has a result too."""
    from hydra.core.hydra_config import HydraConfig

    from vlmtune.record.guard import failure_written

    with failure_written(Path(HydraConfig.get().runtime.output_dir), world):
        return train.job(composed, world)


def sweep_name(chosen: str | None, overrides: Sequence[str], params: Any) -> str:
    """The name of a sweep's folder. `chosen`: the file in sweeps/; `params`: what that file, or a search, sweeps."""
    return trial_names.sweep_name(None if chosen == "null" else chosen, swept_keys(overrides, params))


def swept_keys(overrides: Sequence[str], params: Any) -> list[str]:
    """The keys that have several values, in the order in which they were given."""
    words = [*(f"{key}={values}" for key, values in (params or {}).items()), *overrides]
    return list(dict.fromkeys(each.key_or_group for each in compose.parse(words) if each.is_sweep_override()))


# cached, as ${now:} is: a trial's own overrides sweep nothing
OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
