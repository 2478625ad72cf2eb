"""Where a run's numbers go: always metrics.jsonl, and beside it Weights & Biases, TensorBoard or nothing.

A tracker that can't start is an error that says
what to do; one that fails later costs a warning and its own data, never the training.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmtune.errors import ConfigError, to_install
from vlmtune.record import wandb_tracker
from vlmtune.record.samples import Sample
from vlmtune.record.tensorboard_tracker import TensorBoard

if TYPE_CHECKING:
    from vlmtune.config.schema import TrackerConfig

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place that curves and samples go to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; `step` counts optimizer steps and is the x axis."""

    def samples(self, rows: list[Sample], step: int) -> None:
        """Add a table of answers with their images."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final result (that of result.json) and close. Nothing may follow."""


class NoTracker:
    """tracker=none."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def samples(self, rows: list[Sample], step: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


def check(config: TrackerConfig) -> None:
    """Raise ConfigError where the tracker's package is missing, before time is spent."""
    if config.name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"tracker=tensorboard needs the package tensorboard: {to_install('tensorboard')}, or use tracker=none"
        )


def build(config: TrackerConfig, run_config: Mapping[str, Any], folder: Path, *, resumed: bool = False) -> Tracker:
    """Open the tracker that `config` names, for the run in `folder`, and store `run_config` there without its secrets.

    On one process of a run only. `resumed`: continue the run that the folder's earlier process opened. Raises
    ConfigError when it can't start: unknown WANDB_MODE, no login, no network.
    """
    mode = _mode(config)
    if config.name == "none" or (config.name == "wandb" and mode == "disabled"):
        return NoTracker()
    folder.mkdir(parents=True, exist_ok=True)
    public = without_secrets(run_config)
    if config.name == "tensorboard":
        return Surviving("TensorBoard", TensorBoard(public, folder))
    return Surviving("W&B", wandb_tracker.WandB(config.project, mode, public, folder, resumed))


def show_sweep(config: TrackerConfig, folder: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Show the sweep in `folder` as a whole where its trials are, if that is W&B. A failure is a warning.

    `rows`: of its summary.csv; `metric`: the column that the trials are compared by.
    """
    if config.name != "wandb" or _mode(config) == "disabled":
        return
    try:
        wandb_tracker.summary(folder, rows, metric, config.project, _mode(config))
    except (Exception, SystemExit) as error:
        log.warning("W&B failed and shows the trials only, not the sweep as a whole: %s", error)


def _mode(config: TrackerConfig) -> str:
    return config.mode or os.environ.get("WANDB_MODE") or "offline"


class Surviving:
    """A tracker whose first failure is a warning, after which it gets nothing more; nor after its end."""

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._warning():
            self.tracker.log(values, step)

    def samples(self, rows: list[Sample], step: int) -> None:
        with self._warning():
            self.tracker.samples(rows, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        with self._warning():
            self.tracker.finish(summary)
        self.tracker = NoTracker()

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            log.warning(
                "%s failed and is off for the rest of this run; metrics.jsonl is still written: %s", self.name, error
            )
            self.tracker = NoTracker()


def without_secrets(values: Any) -> Any:
    """Copy nested configuration, leaving out what may be a credential.

    A name with `secret` or `password` in it goes; one with `token` or `key` goes unless it holds a number, as
    `max_new_tokens` does.
    """
    if isinstance(values, Mapping):
        return {name: without_secrets(value) for name, value in values.items() if not _is_secret(str(name), value)}
    return [without_secrets(value) for value in values] if isinstance(values, list | tuple) else values


def _is_secret(name: str, value: Any) -> bool:
    suspicious = (
        ("secret", "password") if isinstance(value, int | float | None) else ("secret", "password", "token", "key")
    )
    return any(word in name.lower() for word in suspicious)
