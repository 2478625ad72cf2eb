"""What a person sees while a sweep runs: a table that keeps up with its trials, or lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.live import Live

from vlmtune import display
from vlmtune.trials import table
from vlmtune.trials.overview import Overview
from vlmtune.trials.trial import Trial
from vlmtune.trials.watched import Watched


class Screen:
    """A context manager around a sweep, or around each batch of a search; each `refresh` brings it up to date.

    On a terminal a line for each trial that ended, and a table below them while trials run. Elsewhere a line when a
    trial begins, and one when it ends.
    """

    def __init__(self, trials: Sequence[Trial], metric: str):
        """`metric`: the name in task.metrics of what the sweep compares."""
        self.overview = Overview(trials, metric)
        self.told = {trial.number: trial.state for trial in trials}
        console = display.console
        self.live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self.draws = console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> Screen:
        if self.draws:
            self.live.start()
        self.refresh()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.refresh()
        finally:
            self.live.stop()

    def refresh(self) -> None:
        """Read what is new in the trials' folders, and show it."""
        self.overview.read()
        for each in self.overview.watched:
            if self.told[each.trial.number] != each.trial.state:
                self.told[each.trial.number] = each.trial.state
                self._tell(each)
        if self.draws:
            self.live.update(table.draw(self.overview, *display.console.size), refresh=True)

    def _tell(self, each: Watched) -> None:
        """Say that a trial began or ended, as far as the table does not show it."""
        trial = each.trial
        name = f"trial {trial.number}" + f" ({trial.label})" * bool(trial.label)
        counts = "" if self.draws else f"; {self.overview.counts()}"
        if trial.is_over:
            spent = "" if trial.seconds is None else f" after {display.duration(trial.seconds)}"
            self._say(f"{name} {trial.state}{spent}{self._outcome(each)}{counts}")
        elif not self.draws:
            self._say(f"{name} begins")

    def _outcome(self, each: Watched) -> str:
        """What a trial that ended reached, or why it ended."""
        if each.trial.state == "completed":
            best = ", the best so far" if each is self.overview.best else ""
            return "" if each.metric is None else f": {self.overview.metric} {each.metric:.4f}{best}"
        if each.trial.state == "failed":
            return f": {each.failure}: {each.reason}; see {each.trial.folder}"
        return f" at step {each.step}"

    def _say(self, text: str) -> None:
        if self.draws:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            display.say(text)
