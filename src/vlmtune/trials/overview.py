"""All trials of a sweep at a moment: the best so far, how many ended, how long the rest takes, which ones to show."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

from vlmtune import display
from vlmtune.metrics import lower_is_better
from vlmtune.trials.trial import Trial
from vlmtune.trials.watched import Watched


class Overview:
    """What the trials' folders say, as of the last `read`."""

    def __init__(self, trials: Sequence[Trial], metric: str):
        """`metric`: the name in task.metrics of what the sweep compares."""
        self.metric = metric.rpartition(".")[2]
        self.sign = -1 if lower_is_better(metric) else 1
        self.watched = [Watched(trial, metric) for trial in trials]
        self.now = time.monotonic()
        self.best: Watched | None = None
        """The one with the best value so far; the first of equals."""

    def read(self) -> None:
        """Read what is new in the folders."""
        self.now = time.monotonic()
        for each in self.watched:
            each.read(self.now)
        scored = [each for each in self.watched if each.trial.state != "failed" and self._value(each) > -math.inf]
        self.best = max(scored, key=self._value, default=None)

    def _value(self, each: Watched) -> float:
        """The greater, the better."""
        return self.sign * each.metric if each.metric is not None and math.isfinite(each.metric) else -math.inf

    def counts(self) -> str:
        """How many trials ended, and how long the others will take."""
        states = Counter(each.trial.state for each in self.watched)
        bad = [f"{states[state]} {state}" for state in ("failed", "interrupted") if states[state]]
        ended = f"{sum(each.trial.is_over for each in self.watched)} of {len(self.watched)} trials ended"
        left = self.left()
        return ended + f" ({', '.join(bad)})" * bool(bad) + (f", {display.duration(left)} left" if left else "")

    def left(self) -> float | None:
        """Seconds until the last trial ends, if as many run at once as now. None where that is not known yet, or where
        none runs.

        A trial takes what the completed ones took on average; before one is completed, what the running ones will have
        taken by the pace of their steps.
        """
        running = [each for each in self.watched if each.trial.state == "running"]
        lefts = [each.left(self.now) for each in running]
        spent = [self.now - (each.trial.began or self.now) for each in running]
        usual = [each.trial.seconds for each in self.watched if each.trial.state == "completed"]
        taken = [seconds for seconds in usual if seconds is not None]
        taken = taken or [so_far + left for so_far, left in zip(spent, lefts, strict=True) if left is not None]
        if not taken or not running:
            return None
        mean = sum(taken) / len(taken)
        rest = [max(mean - so_far, 0.0) if left is None else left for so_far, left in zip(spent, lefts, strict=True)]
        waiting = sum(each.trial.state == "waiting" for each in self.watched)
        return max(*rest, (sum(rest) + waiting * mean) / len(running))

    def foremost(self, most: int) -> list[Watched]:
        """The trials to show where there is room for `most`: those that run, the best, the last that ended, the next
        to begin. In the order of their numbers.
        """
        ended = sorted((each for each in self.watched if each.trial.is_over), key=_ended, reverse=True)
        running = [each for each in self.watched if each.trial.state == "running"]
        ranked = [*running, *([self.best] if self.best else []), *ended, *self.watched]
        numbers = list(dict.fromkeys(each.trial.number for each in ranked))[:most]
        return [each for each in self.watched if each.trial.number in numbers]


def _ended(each: Watched) -> float:
    return each.trial.ended or 0.0
