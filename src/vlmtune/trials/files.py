"""The folder of a sweep: sweep.json, which says what its trials are, and the trials' results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.config import sweep_file
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.launch import lock
from vlmtune.record import runfolder
from vlmtune.trials.trial import Trial


def write(sweep: Path, name: str, metric: str, overrides: Sequence[str], trials: Sequence[dict[str, Any]]) -> None:
    """Write sweep.json. `overrides`: what the user typed; `trials`: as `describe` has them."""
    found = {"name": name, "metric": metric, "overrides": list(overrides), "trials": list(trials)}
    runfolder.write_json(sweep / sweep_file.FILE, found)


def describe(trial: Trial) -> dict[str, Any]:
    """A trial as sweep.json has it."""
    return {"number": trial.number, "overrides": trial.overrides, "swept": trial.swept}


def check_free(sweep: Path, *, resumed: bool) -> None:
    """Raise ConfigError where another command is at work on the sweep, or where it is there and is not resumed."""
    lock.check(sweep)
    if sweep_file.exists(sweep) and not resumed:
        raise ConfigError(
            f"{sweep}: holds a sweep already; choose another hydra.sweep.dir, or go on: -m resume={sweep}"
        )


def result(folder: Path) -> dict[str, Any] | None:
    """What a trial's result.json holds; None where it has none. One that can't be read counts as failed."""
    try:
        return runfolder.read_result(folder)
    except CheckpointError as error:
        return {"status": "failed", "error": {"failure": "other", "message": str(error)}}


def state(folder: Path) -> str:
    """What a trial that does not run is: completed, failed, interrupted, or waiting where it left no result."""
    found = result(folder)
    status = "waiting" if found is None else str(found["status"])
    return "completed" if status == "preflight" else status  # it was asked for no more than the checks


def state_before(folder: Path, *, retry_failed: bool) -> str:
    """As `state`, of a trial that an earlier command may have run: `waiting` for what is to run now.

    A trial that a signal killed goes on from its last checkpoint, as one that was interrupted; one that failed is
    repeated if asked for.
    """
    before, found = state(folder), result(folder) or {}
    was_killed = (found.get("error") or {}).get("failure") == "killed"
    if before == "failed" and not retry_failed and not was_killed:
        return "failed"
    return "completed" if before == "completed" else "waiting"


def objective(folder: Path) -> float | None:
    """The metric of a completed trial; None where it has none, or did not complete."""
    found = result(folder) or {}
    return found.get("objective") if state(folder) == "completed" else None


def exit_code(folder: Path) -> int:
    """Of a trial: 0 where it completed or has not begun, 1 where it failed, 128 + n where signal n interrupted it."""
    status = state(folder)
    if status == "interrupted":
        return 128 + int((result(folder) or {}).get("signal", 0))
    return int(status == "failed")
