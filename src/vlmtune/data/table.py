"""`data.*` -> splits of records: read, audit, hold out, limit.

load
├── data._target_(config)    read_files by default: files to frames; yours may return frames or records
├── source_of(...).audit     records and bad rows
├── data.on_bad_row          stop on bad rows, or continue without them
├── data.on_duplicate        keep repeated rows, skip them, or stop
├── data.validation_fraction
└── data.max_*_rows
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmtune.config.paths import files_of
from vlmtune.config.schema import READ_FILES, DataConfig, TaskConfig
from vlmtune.data.bad_rows import BadRowsError, refusals, repeats_refused, without_repeats
from vlmtune.data.columns import column_problems
from vlmtune.data.rows import joined
from vlmtune.data.selection import hold_out, limited
from vlmtune.data.source import Source, source_of
from vlmtune.data.sources.files import read_table
from vlmtune.data.splits import Split
from vlmtune.errors import ConfigError, DataError, nearest
from vlmtune.metrics import FITS, misfits

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")


def read_files(config: DataConfig) -> dict[str, pd.DataFrame]:
    """Read the files in `data.train`, `data.validation` and `data.test`; the files of one split become one frame.

    Raises DataError with all problems of all files: format, header, missing columns. Rows that can't be read are left
    to the audit.
    """
    frames, problems = {}, []
    for split in SPLITS:
        read = []
        for name in files_of(getattr(config, split)):
            try:
                read.append(read_table(name, config.header))
            except DataError as error:
                problems += error.problems
            else:  # whether a test file needs answers depends on the command
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
    """Read, audit and limit the wanted `splits`. The first one is required; the others are omitted if they don't exist.

    Without a validation split, `data.validation_fraction` of the training images are held out with all their rows.
    Which images those are, and which rows `data.max_train_rows` keeps, depends only on `seed` and the data.

    Raises ConfigError for an invalid `_target_` or key, DataError for a file that can't be read, and BadRowsError for
    bad rows with `data.on_bad_row=fail` or above `data.max_bad_fraction`; each with all problems.
    """
    holds_out = config.validation is None and config.validation_fraction > 0 and set(splits) != {"test"}
    wanted = {*splits, "train", "validation"} if holds_out else set(splits)
    unwanted: dict[str, Any] = {split: None for split in SPLITS if split not in wanted}
    tables = _tables(dataclasses.replace(config, **unwanted), wanted)
    holds_out = holds_out and "train" in tables and "validation" not in tables
    if splits[0] not in tables and not holds_out:
        reads_files = config._target_ == READ_FILES
        target = "" if reads_files else f", or let data._target_={config._target_} return the split {splits[0]!r}"
        raise ConfigError(f"data.{splits[0]}: missing; set data.{splits[0]}=FILE{target}")
    found = _audited(tables, config, task, answers_required, seed)
    if holds_out:  # even if validation is not wanted, so that training rows are the same in every call
        found["train"], found["validation"] = hold_out(found["train"], config.validation_fraction, seed)
    wanted_splits = {name: limited(found[name], name, config, seed) for name in splits if name in found}
    if answers_required:
        _refuse_misfits(wanted_splits, task)
    return wanted_splits


def _refuse_misfits(found: Mapping[str, Split], task: TaskConfig) -> None:
    """Raise DataError, with the first rows of them, for answers that one of the metrics can't score."""
    if not any(name in FITS for name in task.metrics):
        return
    rows = [record for name, split in found.items() if name != "train" for record in split.records]
    problems = [f"{row.place}: {why}" for row in rows for why in misfits(task.metrics, row.answers)]
    if problems:
        more = [f"... and {len(problems) - 5} more"] * (len(problems) > 5)
        raise DataError([*problems[:5], *more, "choose another metric (task.metrics), or correct the answers"])


# ---------------------------------------------------------------- the source


def _tables(config: DataConfig, wanted: set[str]) -> dict[str, Source]:
    """The result of `_target_` for the wanted splits."""
    tables = _function(config._target_)(config)
    if not isinstance(tables, Mapping):
        raise ConfigError(f"data._target_={config._target_}: returned {type(tables).__name__}; return {{split: rows}}")
    sources: dict[str, Source] = {}
    for name, rows in tables.items():
        if name not in SPLITS:
            raise ConfigError(f"data._target_={config._target_}: returned a split {name!r}; {nearest(name, SPLITS)}")
        source = source_of(rows, name)
        if source is None:
            found = type(rows).__name__
            raise ConfigError(f"data._target_={config._target_}: {name} is {found}; make it a DataFrame or Records")
        sources[name] = source
    return {name: source for name, source in sources.items() if name in wanted}


def _function(target: str) -> Callable[[DataConfig], Any]:
    """Import a function by its dotted path. Raises ConfigError that says which part of the path fails."""
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
        raise ConfigError(
            f"data._target_={target}: is {type(function).__name__}; name a function that takes the data config"
        )
    return function  # type: ignore[no-any-return]


def _audited(
    tables: dict[str, Source], config: DataConfig, task: TaskConfig, answers_required: bool, seed: int
) -> dict[str, Split]:
    """Audit every source, then apply the policy for bad rows to all of them together."""
    found: dict[str, Split] = {}
    problems: list[str] = []
    for name, source in tables.items():
        own = dataclasses.replace(config, image_root=image_root_of(config, name))
        try:
            found[name] = source.audit(own, task, answers_required, seed)
        except DataError as error:
            problems += error.problems
    bad = [row for split in found.values() for row in split.bad]
    for name, split in found.items():
        problems += refusals(name, split, config)
        problems += repeats_refused(name, split, config, bad)
    if problems:
        raise BadRowsError(problems, bad)
    return {name: without_repeats(name, split, config) for name, split in found.items()}


def image_root_of(config: DataConfig, split: str) -> str | None:
    """The folder that relative image paths of this split start from; None: the folder of each file."""
    root = config.image_root
    return root.get(split) if isinstance(root, Mapping) else root
