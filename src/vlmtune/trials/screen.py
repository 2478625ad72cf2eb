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
    """A context manager around a sweep; each `refresh` brings it up to date.

    On a terminal a table, and a line above it for each trial that did not complete. Elsewhere a line when a trial
    begins, and one when it ends.
    """

    def __init__(self, trials: Sequence[Trial], metric: str):
        """`metric`: the name in task.metrics of what the sweep compares."""
        self.overview = Overview(trials, metric)
        self.told = {trial.number: trial.state for trial in trials}
        console = display.console
        self.live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self.draws = console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> Screen:
        before = sum(each.trial.is_over for each in self.overview.watched)
        self._say(f"{len(self.overview.watched)} trials" + f", {before} of them ended before" * bool(before))
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
        """Say that a trial began or ended, unless the table shows it well enough."""
        trial = each.trial
        name = f"trial {trial.number}" + f" ({trial.label})" * bool(trial.label)
        if not trial.is_over and not self.draws:
            self._say(f"{name} begins")
        elif trial.is_over and not (self.draws and trial.state == "completed"):
            spent = "" if trial.seconds is None else f" after {display.duration(trial.seconds)}"
            counts = "" if self.draws else f"; {self.overview.counts()}"
            self._say(f"{name} {trial.state}{spent}{self._outcome(each)}{counts}")

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
