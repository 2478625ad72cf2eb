"""Which rows each optimizer step takes: a pure function of seed and step, so that resuming is only counting on."""

from __future__ import annotations

import bisect
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

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs."""
        return math.ceil(epochs * self.steps_per_epoch)

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after `steps` optimizer steps."""
        return steps % self.steps_per_epoch == 0


class ByTokens:
    """Each epoch goes through all rows once, in forward passes of about equal size in tokens, padding counted.

    Rows (or groups, with `by_group`) are shuffled, sorted by length within windows of some hundred, cut into forward
    passes of at most `batch_tokens`, and those are shuffled again: neighbours in length come together, in other company
    each epoch. What is longer by itself goes alone; a group that is, in pieces.
    """

    WINDOW = 32
    """Forward passes in a window, about."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        groups: Sequence[Hashable],
        *,
        batch_tokens: int,
        passes_per_step: int,
        seed: int,
        by_group: bool,
    ):
        """`lengths`: tokens of each row's images and of its text. `passes_per_step`: on all processes together."""
        self.batch_tokens, self.passes_per_step, self.seed = batch_tokens, passes_per_step, seed
        self.lengths = lengths
        members = _members(groups) if by_group else [np.array([row]) for row in range(len(lengths))]
        self.units = [part for rows in members for part in self._pieces(rows.tolist())]
        self.costs = [self.cost(unit) for unit in self.units]
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self.ends: list[int] = []
        """Steps after which each epoch is complete, as far as counted."""

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; others may have a few more or less."""
        return len(self.epoch(0))

    def cost(self, rows: Sequence[int]) -> int:
        """Tokens of these rows with their images once; text that they begin with alike counts for each."""
        return self.lengths[rows[0]][0] + sum(self.lengths[row][1] for row in rows)

    def _pieces(self, rows: list[int]) -> list[list[int]]:
        pieces: list[list[int]] = []
        for row in rows:
            if pieces and self.cost([*pieces[-1], row]) <= self.batch_tokens:
                pieces[-1].append(row)
            else:
                pieces.append([row])
        return pieces

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """Steps of forward passes of row numbers."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.units))
        mean = max(sum(self.costs) / len(self.costs), 1)
        window = max(round(self.WINDOW * self.batch_tokens / mean), 1)
        passes: list[list[int]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window].tolist(), key=self.costs.__getitem__)
            cut: list[list[int]] = []
            for unit in near:  # ascending, so that the last one is the longest
                if cut and (len(cut[-1]) + 1) * self.costs[unit] <= self.batch_tokens:
                    cut[-1].append(unit)
                else:
                    cut.append([unit])
            passes += [[row for unit in cut[i] for row in self.units[unit]] for i in random.permutation(len(cut))]
        return [passes[i : i + self.passes_per_step] for i in range(0, len(passes), self.passes_per_step)]

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number in that epoch."""
        while not self.ends or self.ends[-1] <= step:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(self.epoch(len(self.ends))))
        epoch = bisect.bisect_right(self.ends, step)
        return epoch, step - (self.ends[epoch - 1] if epoch else 0)

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together."""
        epoch, place = self._place(number)
        return [row for rows in self.epoch(epoch)[place] for row in rows]

    def passes(self, number: int, rank: int, accumulation: int) -> list[list[int]]:
        """Rows of each forward pass of process `rank` in step `number`; an epoch's last step may have fewer."""
        epoch, place = self._place(number)
        return self.epoch(epoch)[place][rank * accumulation : (rank + 1) * accumulation]

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs."""
        whole = sum(len(self.epoch(epoch)) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        return whole + (math.ceil(part * len(self.epoch(int(epochs)))) if part else 0)

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after `steps` optimizer steps."""
        return self._place(steps)[1] == 0


class InOrder:
    """Rows of a stream, as they come; an epoch never ends."""

    steps_per_epoch = sys.maxsize

    def __init__(self, rows_per_step: int):
        self.rows_per_step = rows_per_step

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together."""
        return list(range(number * self.rows_per_step, (number + 1) * self.rows_per_step))

    def steps_in(self, epochs: float) -> int:
        return sys.maxsize

    def ends_epoch(self, steps: int) -> bool:
        return False


def _members(groups: Sequence[Hashable]) -> list[np.ndarray]:
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(("alone", row) if group is None else group, []).append(row)
    return [np.array(rows) for rows in found.values()]


def micro_batches(rows: list[int], *, batch_size: int, accumulation: int, rank: int) -> list[list[int]]:
    """The part of a step's rows that process `rank` works on, cut into forward passes; some may be empty."""
    return [rows[i * batch_size : (i + 1) * batch_size] for i in range(rank * accumulation, (rank + 1) * accumulation)]
