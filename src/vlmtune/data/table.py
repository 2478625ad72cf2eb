"""From `data.*` to splits of records: read, audit, hold out, limit.

load
├── data._target_(config)    read_files by default: files to frames; yours may return frames or records
├── audit_frame              frames to records and bad rows
├── data.on_bad_row          stop on bad rows, or go on without them
├── data.on_duplicate        keep rows that repeat an earlier one, leave them out, or stop
├── data.validation_fraction
└── data.max_*_rows
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config.paths import files_of
from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.audit import audit_frame
from vlmtune.data.columns import column_problems
from vlmtune.data.records import BadRow, Record, Split
from vlmtune.data.rows import SHOWN, joined
from vlmtune.data.selection import chosen, hold_out, limited
from vlmtune.data.sources.files import read_table
from vlmtune.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SPLITS", "BadRowsError", "audit_frame", "load", "read_files", "write_quarantine"]

log = logging.getLogger("vlmtune")
SPLITS = ("train", "validation", "test")


class BadRowsError(DataError):
    """Rows can't be used and the policy is to stop. `bad` holds them all; the message shows the first of each file."""

    def __init__(self, problems: Sequence[str], bad: list[BadRow]):
        super().__init__(problems)
        self.bad = bad


def read_files(config: DataConfig) -> dict[str, pd.DataFrame]:
    """Read the files that `data.train`, `data.validation` and `data.test` name, those of one split as one frame.

    Raises DataError with all that is wrong with any of them: form, header, missing columns. Rows that can't be read
    are left to the audit.
    """
    frames, problems = {}, []
    for split in SPLITS:
        read = []
        for name in files_of(getattr(config, split)):
            try:
                read.append(read_table(name, config.header))
            except DataError as error:
                problems += error.problems
            else:  # whether a test file needs answers depends on what it is read for
                problems += column_problems(read[-1].columns, config.columns, name, split != "test")
        if read:
            frames[split] = joined(read)
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
    holds_out = config.validation is None and config.validation_fraction > 0 and set(splits) != {"test"}
    wanted = {*splits, "train", "validation"} if holds_out else set(splits)
    unwanted: dict[str, Any] = {split: None for split in SPLITS if split not in wanted}
    tables = _tables(dataclasses.replace(config, **unwanted), wanted)
    holds_out = holds_out and "train" in tables and "validation" not in tables
    if splits[0] not in tables and not holds_out:
        target = f"let data._target_={config._target_} return the split {splits[0]!r}"
        raise ConfigError(f"data.{splits[0]}: nothing to read; set data.{splits[0]}=FILE, or {target}")
    found = _audited(tables, config, task, answers_required, seed)
    if holds_out:  # also where validation is not asked for: the rows that train are the same in every call
        found["train"], found["validation"] = hold_out(found["train"], config.validation_fraction, seed)
    return {name: limited(found[name], name, config, seed) for name in splits if name in found}


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
        own = dataclasses.replace(config, image_root=image_root_of(config, name))
        if isinstance(rows, Sequence):
            if config.on_duplicate != "keep":
                problems.append(f"data.on_duplicate: the records of {name} are taken as they are; leave it out")
            found[name] = Split(rows)
            continue
        try:
            if hasattr(rows, "audit"):  # larger than memory: reads its rows by itself
                found[name] = rows.audit(own, task, answers_required, seed)
                continue
            found[name] = audit_frame(rows, own, task, rows.attrs.get("file", name), answers_required)
        except DataError as error:
            problems += error.problems
    bad = [row for split in found.values() for row in split.bad]
    for name, split in found.items():
        problems += refusals(name, split, config)
        problems += _repeats_refused(name, split, config, bad)
    if problems:
        raise BadRowsError(problems, bad)
    return {name: _without_repeats(name, split, config) for name, split in found.items()}


def image_root_of(config: DataConfig, split: str) -> str | None:
    """The folder that relative image paths of this split start from; None: that of each file."""
    root = config.image_root
    return root.get(split) if isinstance(root, Mapping) else root


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
    reasons = (re.sub(r"^message \d+: ", "", row.reason) for row in bad)
    kinds = Counter(re.split(r":|\b\d", reason)[0].strip(" (") for reason in reasons)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _first(bad: Sequence[BadRow]) -> list[str]:
    """The first faults, each once, with the row that has it first and how many others do."""
    alike: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        alike.setdefault((row.file, row.reason), []).append(row)
    several = len({row.file for row in bad}) > 1
    shown = []
    for (file, reason), rows in islice(alike.items(), SHOWN):
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        shown.append(f"  {f'{file}, ' if several else ''}{rows[0].place}{more}: {reason}")
    left = sum(map(len, islice(alike.values(), SHOWN, None)))
    shown += [f"  and {left} more rows"] if left else []
    missing = any("no such image" in row.reason for row in bad)
    return shown + (["Relative image paths start at data.image_root, else at the table's folder."] if missing else [])


# ---------------------------------------------------------------- repeated rows


def _repeats(split: Split, most: int | None = None) -> list[BadRow]:
    """Rows that repeat an earlier one, as rows that can't be used."""
    pairs = ((split.records[at], split.records[original]) for at, original in split.repeats[:most])
    return [record.refused(f"duplicate of {_other(record, first)}") for record, first in pairs]


def _other(record: Record, first: Record) -> str:
    place = first.refused("").place
    return place if first.file == record.file else f"{first.file}, {place}"


def _repeats_refused(name: str, split: Split, config: DataConfig, bad: list[BadRow]) -> list[str]:
    """Why data.on_duplicate=fail does not let this split pass, if it doesn't; `bad` gets the rows."""
    if not split.repeats or config.on_duplicate != "fail":
        return []
    rows = _repeats(split)
    bad += rows
    summary = f"{name}: {len(rows)} of {len(split.records)} rows repeat an earlier one"
    return [summary, *_first(rows), "data.on_duplicate=keep trains on them as they stand, drop leaves them out."]


def _without_repeats(name: str, split: Split, config: DataConfig) -> Split:
    """The split by data.on_duplicate; what happens to repeated rows is logged."""
    if not split.repeats:
        return split
    [first] = _repeats(split, most=1)
    found = f"{name}: {len(split.repeats)} of {len(split.records)} rows repeat an earlier one"
    example = f"{first.file}, {first.place} is a {first.reason}"
    if config.on_duplicate == "keep":
        log.info("%s (%s) and are used as they stand; data.on_duplicate=drop leaves them out", found, example)
        return dataclasses.replace(split, repeats=[])
    log.info("%s (%s) and are left out, as data.on_duplicate=drop says", found, example)
    repeated = {at for at, _ in split.repeats}
    kept = chosen(split.records, [at for at in range(len(split.records)) if at not in repeated])
    return Split(kept, split.frame, split.bad + _repeats(split))
