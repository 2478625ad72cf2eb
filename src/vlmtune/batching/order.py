"""Which rows each optimizer step takes: a pure function of seed and step, so a resumed run only needs the step number.

A step's rows are the same on any number of processes, which share them evenly. `passes` are the forward passes of one
process: as many on each, so that none waits for another. Where rows are too few for that, a pass is empty.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from typing import TypeVar

import numpy as np

from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.errors import ConfigError
from vlmtune.launch.steps import step_size
from vlmtune.memo import Memo

T = TypeVar("T")


def share(items: list[T], process: int, processes: int) -> list[T]:
    """What one of several processes takes of `items`: neighbours, and on each the same number or one more."""
    least, more = divmod(len(items), processes)
    start = process * least + min(process, more)
    return items[start : start + least + (process < more)]


class Halving:
    """An order of rows whose forward passes a `Cut` makes, and may make smaller: its steps stay the same."""

    cut: Cut

    @property
    def most_rows(self) -> int:
        """Rows of the largest forward pass."""
        return self.cut.most_rows

    def halve(self) -> None:
        """From here on, make forward passes of half as many rows."""
        self.cut = self.cut.halved()


@dataclass(frozen=True)
class Cut:
    """How a step's rows are split into forward passes."""

    batch_size: int
    """The most rows of a forward pass."""
    rows_per_step: int
    """Of all processes together."""
    processes: int = 1

    @property
    def most_rows(self) -> int:
        """Rows of the largest forward pass."""
        return min(self.batch_size, math.ceil(self.rows_per_step / self.processes))

    def halved(self) -> Cut:
        """The same steps in forward passes of half as many rows."""
        return replace(self, batch_size=math.ceil(self.most_rows / 2))

    def passes(self, rows: list[int], process: int) -> list[list[int]]:
        """The rows of each forward pass of one process in a step of these rows."""
        return self.parts(share(rows, process, self.processes), len(rows))

    def parts(self, own: list[int], count: int) -> list[list[int]]:
        """One process's rows of a step of `count` rows, by forward pass."""
        size = self.batch_size
        passes = math.ceil(math.ceil(count / self.processes) / size)  # of the process with the most rows
        return [own[n * size : (n + 1) * size] for n in range(passes)]


class Order(Halving):
    """Each epoch takes every row once, in a random order that depends on (seed, epoch).

    With `by_group`, groups (images) are shuffled, and rows within each group, but rows of a group stay together.
    """

    def __init__(self, groups: Sequence[Hashable], cut: Cut, *, seed: int, by_group: bool):
        self.cut, self.seed = cut, seed
        self.count = len(groups)
        self.members = _members(groups) if by_group else None
        self.steps_per_epoch = math.ceil(self.count / cut.rows_per_step)
        self.epoch = Memo(self._epoch, most=2)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, in order."""
        random = np.random.default_rng([self.seed, epoch])
        if self.members is None:
            return random.permutation(self.count)
        return np.concatenate([random.permutation(self.members[i]) for i in random.permutation(len(self.members))])

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together; an epoch's last step may have fewer."""
        epoch, place = divmod(number, self.steps_per_epoch)
        start = place * self.cut.rows_per_step
        return self.epoch(epoch)[start : start + self.cut.rows_per_step].tolist()

    def passes(self, number: int, process: int) -> list[list[int]]:
        """Rows of each forward pass of `process` in step `number`."""
        return self.cut.passes(self.step(number), process)

    def step_of(self, row: int) -> int:
        """The step of the first epoch that has this row."""
        return int(np.flatnonzero(self.epoch(0) == row)[0]) // self.cut.rows_per_step

    def steps_in(self, epochs: float) -> int:
        """Number of optimizer steps in `epochs` epochs."""
        return math.ceil(_exact(epochs) * self.steps_per_epoch)

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after `steps` optimizer steps."""
        return steps % self.steps_per_epoch == 0


class ByTokens:
    """Each epoch takes every row once, in forward passes of about equal size in tokens, including padding.

    Rows (or groups, with `by_group`) are shuffled, sorted by length within windows of a few hundred, split into
    forward passes of at most `batch_tokens`, and the passes are shuffled again: rows of similar length are combined,
    differently in each epoch. A row longer than `batch_tokens` gets a pass of its own; a longer group is split.
    """

    WINDOW = 32
    """Approximate number of forward passes in a window."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        groups: Sequence[Hashable],
        *,
        batch_tokens: int,
        passes_per_step: int,
        processes: int = 1,
        seed: int,
        by_group: bool,
    ):
        """`lengths`: tokens of each row's images, and of its text. `passes_per_step`: of all processes together."""
        self.batch_tokens, self.passes_per_step, self.processes = batch_tokens, passes_per_step, processes
        self.seed = seed
        self.lengths = lengths
        members = _members(groups) if by_group else [np.array([row]) for row in range(len(lengths))]
        self.units = [part for rows in members for part in self._pieces(rows.tolist())]
        self.costs = [self.cost(unit) for unit in self.units]
        self.epoch = Memo(self._epoch, most=2)
        self.pieces = 1
        """Each forward pass is made in so many."""
        self.ends: list[int] = []
        """Total steps at the end of each epoch, computed as needed."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; other epochs may have a few more or fewer."""
        return len(self.epoch(0))

    def cost(self, rows: Sequence[int]) -> int:
        """Tokens of these rows with their images counted once, and their text for each row."""
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
        """The steps of an epoch: per step its forward passes, as lists of row numbers."""
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

    def passes(self, number: int, process: int) -> list[list[int]]:
        """Rows of each forward pass of `process` in step `number`."""
        epoch, place = self._place(number)
        parts = self.epoch(epoch)[place]
        by_process = [share(parts, each, self.processes) for each in range(self.processes)]
        return [piece for each in zip_longest(*by_process, fillvalue=[]) for piece in self._pieces_of(each, process)]

    def _pieces_of(self, parts: Sequence[list[int]], process: int) -> list[list[int]]:
        """The pieces of a process's forward pass. `parts`: that of each process, all cut into as many pieces."""
        count = min(self.pieces, max(map(len, parts)))
        return [share(parts[process], number, count) for number in range(count)]

    @property
    def most_rows(self) -> int:
        """Rows of the largest forward pass, in the first epoch."""
        return math.ceil(max(len(part) for parts in self.epoch(0) for part in parts) / self.pieces)

    def halve(self) -> None:
        """From here on, make each forward pass in twice as many pieces: the steps stay the same."""
        self.pieces *= 2

    def step_of(self, row: int) -> int:
        """The step of the first epoch that has this row."""
        return next(number for number, parts in enumerate(self.epoch(0)) if any(row in part for part in parts))

    def steps_in(self, epochs: float) -> int:
        """Number of optimizer steps in `epochs` epochs."""
        whole = sum(len(self.epoch(epoch)) for epoch in range(int(epochs)))
        part = _exact(epochs) - int(epochs)
        return whole + (math.ceil(part * len(self.epoch(int(epochs)))) if part else 0)

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after `steps` optimizer steps."""
        return self._place(steps)[1] == 0


class InOrder(Halving):
    """Rows of a stream in order, without epochs. Each of n processes reads every n-th row, and numbers its own."""

    steps_per_epoch = sys.maxsize

    def __init__(self, cut: Cut):
        self.cut = cut

    def step(self, number: int) -> list[int]:
        """Rows of optimizer step `number` (from 0) on all processes together."""
        return list(range(number * self.cut.rows_per_step, (number + 1) * self.cut.rows_per_step))

    def passes(self, number: int, process: int) -> list[list[int]]:
        """Rows of each forward pass of a process in step `number`, numbered within its own part of the stream."""
        processes = self.cut.processes
        own = [row // processes for row in self.step(number) if row % processes == process]
        return self.cut.parts(own, self.cut.rows_per_step)

    def step_of(self, row: int) -> int:
        raise ValueError("the rows of a stream are not known in advance")

    def steps_in(self, epochs: float) -> int:
        return sys.maxsize

    def ends_epoch(self, steps: int) -> bool:
        return False


def _exact(epochs: float) -> Fraction:
    """The number as it is written in decimals: 0.55 of 100 steps are 55, and in floats a little more."""
    return Fraction(str(epochs))


def _members(groups: Sequence[Hashable]) -> list[np.ndarray]:
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(("alone", row) if group is None else group, []).append(row)
    return [np.array(rows) for rows in found.values()]


@dataclass(frozen=True)
class Plan:
    """The steps of a run."""

    order: Order | ByTokens | InOrder
    total_steps: int
    by_group: bool = False
    """Whether rows of a group stay together."""


def plan(
    trainer: TrainerConfig,
    groups: Sequence[Hashable],
    lengths: Sequence[tuple[int, int]],
    *,
    processes: int,
    streamed: bool,
    by_group: bool,
) -> Plan:
    """The steps of a run, by rows or by tokens. Rows of a group (an image) stay together if `by_group`.

    `lengths`: as in `ByTokens`, only needed with `trainer.batch_tokens`. Raises ConfigError if that is set for a
    stream.
    """
    size = step_size(trainer, processes)
    cut = Cut(trainer.batch_size, size, processes)
    if trainer.batch_tokens and streamed:
        raise ConfigError("trainer.batch_tokens: a stream has no known row lengths; use trainer.batch_size")
    order: Order | ByTokens | InOrder
    if streamed:
        order = InOrder(cut)
    elif trainer.batch_tokens:
        order = ByTokens(
            lengths,
            groups,
            batch_tokens=trainer.batch_tokens,
            passes_per_step=size,
            processes=processes,
            seed=trainer.seed,
            by_group=by_group,
        )
    else:
        order = Order(groups, cut, seed=trainer.seed, by_group=by_group)
    return Plan(order, trainer.max_steps or order.steps_in(trainer.epochs), by_group)


def first_rows(records: Records, trainer: TrainerConfig, *, most: int) -> list[Record]:
    """Sample rows from before the steps are planned, at most as many as fit into one forward pass: those that training
    by rows begins with, or the first rows of a stream.
    """
    count = min(most, trainer.batch_size)
    if records.streamed:
        return [records[row] for row in range(count)]
    epoch = Order(range(len(records)), Cut(count, count), seed=trainer.seed, by_group=False)
    return [records[row] for row in epoch.step(0)]
