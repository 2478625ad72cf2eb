"""From `data.*` to splits of records: read, audit, hold out, limit.

load
├── data._target_(config)    read_files by default: files to frames; yours may return frames or records
├── audit_frame              frames to records and bad rows
├── data.on_bad_row          stop on bad rows, or go on without them
├── data.validation_fraction
└── data.max_*_rows
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config import DataConfig, TaskConfig
from vlmtune.data.audit import audit_frame, column_problems
from vlmtune.data.files import SHOWN, read_table
from vlmtune.data.records import BadRow, Record, Split
from vlmtune.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SPLITS", "BadRowsError", "audit_frame", "load", "read_files", "write_quarantine"]

SPLITS = ("train", "validation", "test")


class BadRowsError(DataError):
    """Rows can't be used and the policy is to stop. `bad` holds them all; the message shows the first of each file."""

    def __init__(self, problems: Sequence[str], bad: list[BadRow]):
        super().__init__(problems)
        self.bad = bad


def read_files(config: DataConfig) -> dict[str, pd.DataFrame]:
    """Read the files that `data.train`, `data.validation` and `data.test` name, as frames.

    Raises DataError with all that is wrong with any of them: encoding, form, missing columns.
    """
    frames, problems = {}, []
    for split in SPLITS:
        if (path := getattr(config, split)) is None:
            continue
        try:
            frames[split] = read_table(Path(expanduser(path)))
        except DataError as error:
            problems += error.problems
        else:  # whether a test file needs answers depends on what it is read for
            problems += column_problems(frames[split].columns, config.columns, path, split != "test")
    if problems:
        raise DataError(problems)
    return frames


def load(
    config: DataConfig,
    task: TaskConfig,
    seed: int,
    splits: Sequence[str] = SPLITS,
    *,
    answers_required: bool = True,
) -> dict[str, Split]:
    """Read, audit and cut the wanted `splits`; the first of them must be there, the others are left out if they aren't.

    Without a validation split, `data.validation_fraction` of the training images are held out with all their rows.
    Which images those are, and which rows `data.max_train_rows` keeps, depends on `seed` and the data alone.

    Raises ConfigError for a `_target_` or a key that doesn't work, DataError for a file that can't be read, and
    BadRowsError for bad rows under `data.on_bad_row=fail`, or above `data.max_bad_fraction`; each with all problems.
    """
    hold_out = config.validation is None and config.validation_fraction > 0 and set(splits) != {"test"}
    wanted = {*splits, "train", "validation"} if hold_out else set(splits)
    unwanted: dict[str, Any] = {split: None for split in SPLITS if split not in wanted}
    tables = _tables(dataclasses.replace(config, **unwanted), wanted)
    hold_out = hold_out and "train" in tables and "validation" not in tables
    if splits[0] not in tables and not hold_out:
        target = f"let data._target_={config._target_} return the split {splits[0]!r}"
        raise ConfigError(f"data.{splits[0]}: nothing to read; set data.{splits[0]}=FILE, or {target}")
    found = _audited(tables, config, task, answers_required, seed)
    if hold_out:  # also where validation is not asked for: the rows that train are the same in every call
        found["train"], found["validation"] = _hold_out(found["train"], config.validation_fraction, seed)
    return {name: _limited(found[name], name, config, seed) for name in splits if name in found}


def write_quarantine(path: Path, bad: Sequence[BadRow]) -> None:
    """Write bad rows as CSV with the columns file, line, row, reason; `line` is empty for rows of no file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "line", "row", "reason"])
        writer.writerows([row.file, row.line or "", row.row, row.reason] for row in bad)


# ---------------------------------------------------------------- the source


def _tables(config: DataConfig, wanted: set[str]) -> dict[str, Any]:
    """What `_target_` returns for the wanted splits: frames or sequences of records."""
    import pandas as pd

    tables = _function(config._target_)(config)
    if not isinstance(tables, Mapping):
        raise ConfigError(f"data._target_={config._target_}: returned {type(tables).__name__}; return {{split: rows}}")
    for name, rows in tables.items():
        if name not in SPLITS:
            raise ConfigError(f"data._target_={config._target_}: returned a split {name!r}; {nearest(name, SPLITS)}")
        if not isinstance(rows, pd.DataFrame | Sequence) and not hasattr(rows, "audit"):
            kind = type(rows).__name__
            raise ConfigError(f"data._target_={config._target_}: {name} is {kind}; make it a DataFrame or Records")
    return {name: rows for name, rows in tables.items() if name in wanted}


def _function(target: str) -> Callable[[DataConfig], Any]:
    """Import a function by its dotted path. Raises ConfigError that says which step of the path fails."""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"data._target_={target}: must be a dotted path, for instance my_data.{target or 'load'}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        hint = "put its folder on PYTHONPATH, or install it"
        raise ConfigError(f"data._target_={target}: can't import {module_name} ({error}); {hint}") from error
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"data._target_={target}: {module_name} has no {name}; {nearest(name, functions)}")
    if not callable(function):
        raise ConfigError(f"data._target_={target}: is {type(function).__name__}; name a function of the data config")
    return function  # type: ignore[no-any-return]


# ---------------------------------------------------------------- bad rows


def _audited(
    tables: dict[str, Any], config: DataConfig, task: TaskConfig, answers_required: bool, seed: int
) -> dict[str, Split]:
    """Audit every frame and apply the policy for bad rows to all of them together; records are taken as they are."""
    found: dict[str, Split] = {}
    problems: list[str] = []
    for name, rows in tables.items():
        if isinstance(rows, Sequence):
            found[name] = Split(rows)
            continue
        try:
            if hasattr(rows, "audit"):  # larger than memory: reads its rows by itself
                found[name] = rows.audit(config, task, answers_required, seed)
                continue
            found[name] = audit_frame(rows, config, task, rows.attrs.get("file", name), answers_required)
        except DataError as error:
            problems += error.problems
    bad = [row for split in found.values() for row in split.bad]
    for name, split in found.items():
        problems += refusals(name, split, config)
    if problems:
        raise BadRowsError(problems, bad)
    return found


def refusals(name: str, split: Split, config: DataConfig) -> list[str]:
    """Why the policy does not let this split pass, if it doesn't."""
    total = len(split.records) + len(split.bad)
    if total == 0:
        return [f"{name}: has no rows"]
    if not split.bad:
        return []
    share = len(split.bad) / total
    summary = f"{split.bad[0].file}: {len(split.bad)} of {total} rows can't be used ({_kinds(split.bad)})"
    if config.on_bad_row == "fail":
        advice = "Correct them, or leave them out with data.on_bad_row=drop; quarantine.csv then lists them all."
        return [summary, *_first(split.bad), advice]
    if share > config.max_bad_fraction or share == 1:
        limit = f"above data.max_bad_fraction={config.max_bad_fraction:g}" if share < 1 else "no row is left"
        return [f"{summary}; {limit}", *_first(split.bad)]
    return []


def _kinds(bad: Sequence[BadRow]) -> str:
    kinds = Counter(re.split(r"[:\d]", row.reason)[0].strip() for row in bad)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _first(bad: Sequence[BadRow]) -> list[str]:
    shown = [f"  {f'line {row.line}, ' if row.line else ''}row {row.row}: {row.reason}" for row in bad[:SHOWN]]
    shown += [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    missing = any("no such image" in row.reason for row in bad)
    return shown + (["Relative image paths start at data.image_root, else at the table's folder."] if missing else [])


# ---------------------------------------------------------------- which rows


def _hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split off `fraction` of the images (at least one, never all). A row of no group counts as an image of its own."""
    groups_of = getattr(train.records, "groups", None) or [record.group for record in train.records]
    keys = _joined([("row", i) if group is None else group for i, group in enumerate(groups_of)])
    groups = list(dict.fromkeys(keys))
    if len(groups) < 2:
        raise DataError(f"data.validation_fraction={fraction:g}: all rows show one image; set data.validation instead")
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    chosen = set(random.Random(seed).sample(groups, count))
    kept = chosen_rows(train.records, [i for i, key in enumerate(keys) if key not in chosen])
    taken = chosen_rows(train.records, [i for i, key in enumerate(keys) if key in chosen])
    return Split(kept, train.frame, train.bad), Split(taken, train.frame)


def _joined(groups: Sequence[Hashable]) -> list[Hashable]:
    """One key for all rows that share an image with each other, directly or through other rows."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for group in groups:
        keys = group if isinstance(group, tuple) else (group,)
        for key in keys:
            parent[root(key)] = root(keys[0])
    return [root(group[0] if isinstance(group, tuple) else group) for group in groups]


def chosen_rows(records: Sequence[Record], rows: Sequence[int]) -> Sequence[Record]:
    """These of the records; what reads them from disk goes on doing so."""
    select = getattr(records, "select", None)
    return select(rows) if select else [records[row] for row in rows]


def _limited(split: Split, name: str, config: DataConfig, seed: int) -> Split:
    most = config.max_train_rows if name == "train" else config.max_eval_rows
    if most is None or len(split) <= most:
        return split
    if getattr(split.records, "in_order", False):
        raise ConfigError("data.max_train_rows: a stream is as long as trainer.max_steps asks for")
    rows = sorted(random.Random(seed).sample(range(len(split)), most)) if name == "train" else range(most)
    return dataclasses.replace(split, records=chosen_rows(split.records, rows))
