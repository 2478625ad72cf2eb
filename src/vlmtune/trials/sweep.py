"""A sweep at work: its trials and all that it writes beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune import display
from vlmtune.commands import typed
from vlmtune.config import sweep_file
from vlmtune.config.launchers import Processes
from vlmtune.config.schema import TrackerConfig
from vlmtune.errors import ConfigError
from vlmtune.launch import lock
from vlmtune.launch.signals import Interrupted
from vlmtune.record import tracking
from vlmtune.trials import files, summary
from vlmtune.trials.running import Runner, Work
from vlmtune.trials.screen import Screen
from vlmtune.trials.trial import Trial

FEATURES = "features"
"""In the sweep's folder: what its trials have in common, of towers that don't train."""


class Sweep:
    """The trials of one command; `opened` makes it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        metric: str,
        overrides: Sequence[str],
        settings: Processes,
        tracker: TrackerConfig,
    ):
        """`overrides`: what the user typed. `metric`: what the trials are compared by. `tracker`: shows the sweep."""
        self.folder, self.name, self.metric, self.overrides = folder, name, metric, overrides
        self.settings, self.tracker = settings, tracker
        before = sweep_file.read(folder)["trials"] if sweep_file.exists(folder) else []
        self.recorded: dict[int, dict[str, Any]] = {trial["number"]: trial for trial in before}
        self.trials: list[Trial] = []
        self.runner: Runner | None = None

    def add(self, number: int, overrides: Sequence[str], swept: Sequence[str]) -> Trial:
        """A trial of this command; those of an earlier one, which a search does not begin again, come before it.

        Raises ConfigError where an earlier command had another trial in its place.
        """
        for missing in range(len(self.trials), number):
            before, folder = self.recorded[missing], self.folder / str(missing)
            self.trials.append(Trial(missing, before["overrides"], before["swept"], folder, files.state(folder)))
        earlier = self.recorded.get(number)
        if earlier is not None and earlier["overrides"] != list(overrides):
            raise ConfigError(
                f"{self.folder}: trial {number} was {' '.join(earlier['overrides'])} and is {' '.join(overrides)} now, "
                "as a file in sweeps/ has changed; put it back, or start a new sweep"
            )
        folder = self.folder / str(number)
        state = files.state_before(folder, retry_failed=self.settings.retry_failed)
        self.trials.append(Trial(number, list(overrides), list(swept), folder, state))
        return self.trials[-1]

    def run(self, trials: Sequence[Trial], work: Callable[[Trial], Work], modules: Sequence[str]) -> None:
        """Run those of `trials` that wait, while a screen shows all of the sweep. `modules`: imported once for all.

        Raises Interrupted once a signal has ended those that ran.
        """
        self.record()
        if not any(trial.state == "waiting" for trial in trials):
            return
        self.runner = self.runner or Runner(self.settings.parallel, self.settings.max_minutes, modules)
        try:
            with Screen(self.trials, self.metric) as screen:
                self.runner.run(trials, work, partial(self._show, screen))
        except Interrupted:
            display.say(f"to go on with this sweep: {typed('train')} -m resume={self.folder}")
            raise

    def _show(self, screen: Screen, ended: bool) -> None:
        screen.refresh()
        if ended:
            summary.write(self.folder)

    def record(self) -> None:
        """Write what is known of the trials; those of an earlier command that are still to come stay."""
        self.recorded |= {trial.number: files.describe(trial) for trial in self.trials}
        files.write(self.folder, self.name, self.metric, self.overrides, list(self.recorded.values()))
        summary.write(self.folder)

    def collect(self, describe: Callable[[list[str]], tuple[list[str], list[str]]]) -> None:
        """Take the trials that another launcher started from their folders. `describe`: a trial's overrides as they are
        recorded, and those of them that are swept, from what Hydra wrote down.
        """
        found = {int(path.parts[-3]): path for path in self.folder.glob("*/.hydra/overrides.yaml") if _is_trial(path)}
        for number, path in sorted(found.items()):
            folder = self.folder / str(number)
            overrides = [str(override) for override in OmegaConf.load(path)]
            self.trials.append(Trial(number, *describe(overrides), folder, files.state(folder)))
        self.record()

    def finish(self) -> list[int]:
        """Say what the sweep found, and remove what only its trials needed. Returns the trials' exit codes."""
        if all(trial.is_over for trial in self.trials) and not self.settings.keep_features:
            shutil.rmtree(self.folder / FEATURES, ignore_errors=True)
        if self.trials:
            from vlmtune.comparison import finish

            display.say(finish(self.folder))
            if all(trial.is_over for trial in self.trials):
                tracking.show_sweep(self.tracker, self.folder, summary.write(self.folder), f"eval/{self.metric}")
        return [files.exit_code(trial.folder) for trial in self.trials]


def _is_trial(overrides: Path) -> bool:
    return overrides.parts[-3].isdecimal()


@contextmanager
def opened(folder: Path, *described: Any) -> Iterator[Sweep]:
    """The sweep in `folder`, `described` as `Sweep` takes it, which no other command can use meanwhile. Raises
    ConfigError.
    """
    with lock.held(folder):
        yield Sweep(folder, *described)
