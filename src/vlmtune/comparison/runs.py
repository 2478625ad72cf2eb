"""Run folders that are compared: what each says of itself, and by which keys they differ."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune.config import saved, sweep_file
from vlmtune.config.trial_names import SEED
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.metrics import METRICS, lower_is_better
from vlmtune.record import environment
from vlmtune.record.outputs import score_columns
from vlmtune.record.runfolder import read_result

NO_DIFFERENCE = ("resume", "tracker", "backend", "preflight", "data.cache", "trainer.num_workers")
"""Beginnings of keys that don't decide what a run learns."""


@dataclass
class Run:
    """One run folder."""

    folder: Path
    name: str = ""
    """The end of its path that no other run has: a trial's number."""
    swept: dict[str, str] = field(default_factory=dict)
    """The keys by which the compared runs differ, and this run's values."""
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """As in result.json; `unfinished` where there is none yet, `waiting` where the run has not begun."""
        return str(self.result.get("status") or ("unfinished" if self.folder.exists() else "waiting"))

    @property
    def failure(self) -> tuple[str, str]:
        """The class and the message of what ended it."""
        error = self.result.get("error") or {}
        return error.get("failure") or "", error.get("message") or ""

    @property
    def metrics(self) -> list[str]:
        """The task's metrics; the first is the objective."""
        return list((self.config.get("task") or {}).get("metrics") or [])

    @property
    def scored(self) -> list[str]:
        """The metrics whose scores of each row are in predictions.csv, which of several has the first alone in runs of
        earlier versions.
        """
        try:
            header = (self.folder / "predictions.csv").open(encoding="utf-8-sig", newline="")
        except OSError:
            return []
        with header:
            present = next(csv.reader(header), [])
        columns = zip(self.metrics, score_columns(self.metrics), strict=True)
        return [metric for metric, column in columns if column in present]

    @property
    def seconds(self) -> float | None:
        return (self.result.get("speed") or {}).get("training_seconds")

    @property
    def memory(self) -> int | None:
        """Peak bytes: of the device, or of main memory where there was none."""
        return environment.peak_bytes(self.result.get("memory") or {})

    def lower_is_better(self, metric: str) -> bool:
        """Code that the run names is not imported: of a user's metric its result says it, if it was the objective."""
        if metric in METRICS:
            return lower_is_better(metric)
        return self.metrics[:1] == [metric] and self.result.get("objective_is") == "minimized"

    def of_test(self, metric: str) -> float | None:
        return (self.result.get("metrics") or {}).get(f"test/{metric}")


def find(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run's or a sweep's. Raises ConfigError for a folder that is neither."""
    runs: dict[Path, Run] = {}
    for folder in folders:
        for run in _runs_in(folder.expanduser()):
            runs.setdefault(run.folder.resolve(), run)
    found = list(runs.values())
    for run, name in zip(found, _names(list(runs)), strict=True):
        run.name = name
    if len(folders) > 1 or not all(run.swept for run in found):
        _add_differences(found)
    return found


def _runs_in(folder: Path) -> Iterator[Run]:
    trials = {int(path.name): path for path in folder.glob("*") if path.name.isdecimal() and _is_run(path)}
    listed = {trial["number"]: trial for trial in _trials(folder)}
    if listed or (trials and not _is_run(folder)):
        for number in sorted({*trials, *listed}):
            swept = dict(_pair(word) for word in listed.get(number, {}).get("swept", []))
            yield _read(folder / str(number), swept)
    elif _is_run(folder):
        yield _read(folder, {})
    else:
        reason = "has neither a run (config.yaml, result.json) nor numbered trials" if folder.is_dir() else "not found"
        raise ConfigError(f"{folder}: {reason}; name the folder of a run or of a sweep")


def _trials(folder: Path) -> list[dict[str, Any]]:
    """The trials in a sweep's record; none where there is no record."""
    return list(sweep_file.read(folder)["trials"]) if sweep_file.exists(folder) else []


def _pair(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "result.json").is_file()


def _read(folder: Path, swept: dict[str, str]) -> Run:
    """A run; one with a damaged file is a failed one, which hides no other."""
    path, config = folder / "config.yaml", dict[Any, Any]()
    try:
        result = read_result(folder) or {}
        if path.is_file():
            values = OmegaConf.to_container(saved.read(path))
            assert isinstance(values, dict)
            config = values
    except CheckpointError as error:
        result = {"status": "failed", "error": {"failure": "other", "message": str(error)}}
    return Run(folder, swept=swept, result=result, config=config)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def _add_differences(runs: Sequence[Run]) -> None:
    """Let each run's `swept` be the keys that all configs have and that differ between them."""
    flat = {run.name: dict(_flat(run.config)) for run in runs if run.config}
    common = set.intersection(*map(set, flat.values())) if flat else set()
    keys = [key for key in next(iter(flat.values()), {}) if key in common and not key.startswith(NO_DIFFERENCE)]
    differ = [key for key in keys if len({values[key] for values in flat.values()}) > 1]
    for run in runs:
        run.swept = {key: flat[run.name][key] for key in differ} if run.name in flat else {}


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _as_typed(value)


def _as_typed(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(_as_typed, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together; copies of a run stay apart."""
    groups: dict[Any, list[Run]] = {}
    copies: Counter[Any] = Counter()
    for run in runs:
        rest = tuple(sorted((key, value) for key, value in run.swept.items() if key != SEED))
        same = (rest, run.swept.get(SEED))
        groups.setdefault((rest, copies[same]), []).append(run)
        copies[same] += 1
    return list(groups.values())
