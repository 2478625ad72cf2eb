"""Where a run belongs among others: on its own, or among the trials of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.config import sweep_file
from vlmtune.config.trial_names import trial_name
from vlmtune.errors import CheckpointError

LONGEST_TAG = 64
"""Letters, for W&B."""


def of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`group`, `name`, `job_type` and `tags` as W&B has them. All trials of a sweep make a group, and each is named
    after what differs. `config`: of the run, as plain values.
    """
    folder = folder.resolve()
    chosen = (("model", "name"), ("adapter", "method"), ("task", "name"))
    tags = [str(value) for group, key in chosen if (value := (config.get(group) or {}).get(key))]
    if not sweep_file.exists(folder.parent) and not folder.name.isdigit():  # other launchers write no sweep.json
        return {"group": None, "name": "/".join(folder.parts[-3:]), "job_type": "train", "tags": _short(tags)}
    name = _label(folder) or folder.name
    return {"group": group(folder.parent), "name": name, "job_type": "trial", "tags": _short([*tags, folder.parts[-3]])}


def group(sweep: Path) -> str:
    """The name of a sweep among all: `<name>/<stamp>`."""
    return "/".join(sweep.resolve().parts[-2:])


def _label(folder: Path) -> str | None:
    """What differs between a trial and others of its sweep."""
    try:
        trials = sweep_file.read(folder.parent)["trials"]
    except CheckpointError:
        return None
    return next((trial_name(trial["swept"]) for trial in trials if str(trial["number"]) == folder.name), None)


def _short(tags: list[str]) -> list[str]:
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))
