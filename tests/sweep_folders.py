"""Trials of a sweep and what they write, made up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from vlmtune.record import runfolder
from vlmtune.trials.trial import Trial


def trial(sweep: Path, number: int, *, state: str = "waiting") -> Trial:
    swept = [f"adapter.r={2**number}", f"trainer.learning_rate={number + 1}e-4"]
    return Trial(number, [*swept, "tracker=none"], swept, sweep / str(number), state)


def begin(trial: Trial, total_steps: int = 60, *, ago: float = 0.0) -> None:
    """As a run leaves its folder before the first step."""
    trial.state, trial.began = "running", time.monotonic() - ago
    trial.folder.mkdir(parents=True, exist_ok=True)
    runfolder.write_json(trial.folder / "environment.json", {"total_steps": total_steps, "trainable_weights": 123})
    (trial.folder / "metrics.jsonl").write_text("")


def log(trial: Trial, step: int, **values: Any) -> None:
    """A line of metrics.jsonl, with `__` for the slash of a name."""
    row = {"step": step} | {name.replace("__", "/"): value for name, value in values.items()}
    with (trial.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def end(trial: Trial, **result: Any) -> None:
    """A result as a run writes it: completed unless an error is given."""
    trial.state = result.setdefault("status", "failed" if result.get("error") else "completed")
    trial.ended = time.monotonic()
    trial.folder.mkdir(parents=True, exist_ok=True)
    runfolder.write_json(trial.folder / "result.json", {"error": None, "metrics": {}, **result})


def error(failure: str, message: str) -> dict[str, str]:
    return {"type": "Made", "failure": failure, "message": message}
