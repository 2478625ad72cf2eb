"""Which rows each optimizer step takes: a pure function of seed and step, so that resuming is only counting on."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Hashable, Sequence

import numpy as np


class Order:
    """Each epoch goes through all rows once, in an order drawn from (seed, epoch).

    With `by_group`, groups (images) are shuffled and so are the rows in them, but rows of a group stay together.
    """

    def __init__(self, groups: Sequence[Hashable], *, rows_per_step: int, seed: int, by_group: bool):
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.count = len(groups)
        self.members = _members(groups) if by_group else None
        self.steps_per_epoch = math.ceil(self.count / rows_per_step)
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, in order."""
        random = np.random.default_rng([self.seed, epoch])
        if self.members is None:
            return random.permutation(self.count)
        return np.concatenate([random.permutation(self.members[i]) for i in random.permutation(len(self.members))])

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together; an epoch's last step may have fewer."""
        epoch, place = divmod(number, self.steps_per_epoch)
        start = place * self.rows_per_step
        return self.epoch(epoch)[start : start + self.rows_per_step].tolist()


class InOrder:
    """Rows of a stream, as they come; an epoch never ends."""

    steps_per_epoch = sys.maxsize

    def __init__(self, rows_per_step: int):
        self.rows_per_step = rows_per_step

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together."""
        return list(range(number * self.rows_per_step, (number + 1) * self.rows_per_step))


def _members(groups: Sequence[Hashable]) -> list[np.ndarray]:
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(("alone", row) if group is None else group, []).append(row)
    return [np.array(rows) for rows in found.values()]


def micro_batches(rows: list[int], *, batch_size: int, accumulation: int, rank: int) -> list[list[int]]:
    """The part of a step's rows that process `rank` works on, cut into forward passes; some may be empty."""
    return [rows[i * batch_size : (i + 1) * batch_size] for i in range(rank * accumulation, (rank + 1) * accumulation)]
