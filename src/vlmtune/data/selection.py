"""Selects rows of a split: holds out whole images, or limits the number of rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Hashable, Sequence

from vlmtune.config.schema import DataConfig
from vlmtune.data.splits import Split
from vlmtune.errors import ConfigError, DataError


def hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split off `fraction` of the images (at least one, never all). A row without a group counts as its own image."""
    keys = _joined([("row", i) if group is None else group for i, group in enumerate(train.records.groups())])
    groups = list(dict.fromkeys(keys))
    if len(groups) < 2:
        raise DataError(f"data.validation_fraction={fraction:g}: all rows show one image; set data.validation instead")
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    held_out = set(random.Random(seed).sample(groups, count))
    kept = train.records.select([i for i, key in enumerate(keys) if key not in held_out])
    taken = train.records.select([i for i, key in enumerate(keys) if key in held_out])
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


def limited(split: Split, name: str, config: DataConfig, seed: int) -> Split:
    most = config.max_train_rows if name == "train" else config.max_eval_rows
    if most is None or len(split) <= most:
        return split
    if split.records.streamed:
        raise ConfigError("data.max_train_rows: a stream is as long as trainer.max_steps asks for")
    rows = sorted(random.Random(seed).sample(range(len(split)), most)) if name == "train" else range(most)
    return dataclasses.replace(split, records=split.records.select(rows))
