"""summary.csv: a sweep in one table, a line per trial."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

from vlmtune.config import sweep_file
from vlmtune.config.trial_names import SEED
from vlmtune.record import environment, runfolder
from vlmtune.trials import files


def write(sweep: Path) -> list[dict[str, Any]]:
    """Write `sweep`/summary.csv from sweep.json and the trials' folders, and return its rows, by the trials' numbers.

    Every row has all columns, in this order: `trial`; each swept key by its own name, with the value as it was typed;
    `overrides`, as a shell takes them; `group`, where seeds are swept: what differs but for the seed; `status` as in
    result.json, or `unfinished` where there is none, or `waiting` where the run has not begun; `failure` and `message`;
    every metric of any result; `seconds` spent in steps, `rows_per_second` of these; `peak_memory_bytes` on the
    accelerator, in main memory where there is none; `trainable_weights`; `folder`. What is not known is None, in the
    file an empty cell. Raises CheckpointError where the folder is not one of a sweep.
    """
    trials = sorted(sweep_file.read(sweep)["trials"], key=lambda trial: trial["number"])
    results = [_result(sweep / str(trial["number"])) for trial in trials]
    values = [_values(trial["swept"]) for trial in trials]
    keys = dict.fromkeys(key for each in values for key in each)
    metrics = dict.fromkeys(name for result in results for name in result.get("metrics") or {})
    rows = []
    for trial, own, result in zip(trials, values, results, strict=True):
        folder = sweep / str(trial["number"])
        row = {"trial": trial["number"], **keys, **own, "overrides": shlex.join(trial["overrides"])}
        if SEED in keys:
            row["group"] = " ".join(override for override in trial["swept"] if _key(override) != SEED) or "all"
        rows.append(row | _ending(result) | metrics | (result.get("metrics") or {}) | _costs(folder, result))
    _write(sweep / "summary.csv", rows)
    return rows


def _ending(result: dict[str, Any]) -> dict[str, Any]:
    error = result.get("error") or {}
    message = " ".join(str(error.get("message") or "").split())  # one line of the file per trial
    return {"status": result["status"], "failure": error.get("failure"), "message": message or None}


def _costs(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    speed, memory = result.get("speed") or {}, result.get("memory") or {}
    return {
        "seconds": speed.get("training_seconds"),
        "rows_per_second": speed.get("examples_per_second"),
        "peak_memory_bytes": environment.peak_bytes(memory),
        "trainable_weights": _read(folder / "environment.json").get("trainable_weights"),
        "folder": str(folder),
    }


def _result(folder: Path) -> dict[str, Any]:
    """What result.json holds, or a status in its place."""
    return files.result(folder) or {"status": "unfinished" if folder.exists() else "waiting"}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _values(swept: list[str]) -> dict[str, str]:
    return {_key(override): override.partition("=")[2] for override in swept}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runfolder.write_whole(path, text.getvalue())
