"""The rows that a finished run answers or is scored on: `data.test`, without the run's training tables."""

from __future__ import annotations

import dataclasses

from vlmtune.config.schema import READ_FILES, READ_HUB, DataConfig


def of_test_rows(data: DataConfig) -> DataConfig:
    """The config for reading only `data.test`: a file, or a data set on the hub if the run was trained on one."""
    from vlmtune.config.paths import files_of
    from vlmtune.data.sources.files import is_table

    own = dataclasses.replace(data, train=None, validation=None, validation_fraction=0.0)
    hub = data._target_ == READ_HUB and not all(map(is_table, files_of(data.test)))
    return own if hub else dataclasses.replace(own, _target_=READ_FILES)


def inputs_of(data: DataConfig) -> list[str]:
    """The files that the config reads."""
    values = (getattr(data, split) for split in ("train", "validation", "test"))
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]
