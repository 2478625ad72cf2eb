"""Rows of a data set that are read during training."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.reader import RowReader
from vlmtune.data.records import Record
from vlmtune.data.sources.hub_rows import CheckedReader, HubReader, HubTable, undecoded
from vlmtune.data.splits import Records, Split
from vlmtune.display import own
from vlmtune.errors import DataError


class HubStream:
    """A split that is read during training; for evaluation splits, the first rows are read at the start."""

    def __init__(self, dataset: Any, name: str, split: str):
        self.dataset, self.name, self.split = undecoded(dataset), name, split

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int = 0) -> Split:
        """Check the columns, and the rows of an evaluation; training rows are checked when they are read."""
        if self.split != "train":
            import datasets

            rows = list(self.dataset.take(config.max_eval_rows))
            table = datasets.Dataset.from_list(rows, features=self.dataset.features)
            return HubTable(table, self.name).audit(config, task, answers_required, seed)
        stream = self.dataset
        if config.shuffle_buffer > 1:
            stream = stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        reader = HubReader(self.dataset, config, task, self.name, answers_required)
        return Split(StreamedRows(stream, reader, config, seed))


class StreamedRows(Records):
    """An endless stream: after the last row it starts again in a new order. Bad rows stop the run, or are logged.

    Reading forward is cheap; reading backward starts from the beginning.
    """

    on_demand = streamed = True

    def __init__(
        self,
        dataset: Any,
        reader: RowReader,
        config: DataConfig,
        seed: int,
        faults_of: Callable[[Record], list[str]] = lambda record: [],
        process: int = 0,
        processes: int = 1,
    ):
        self.dataset, self.reader, self.config, self.seed = dataset, reader, config, seed
        self.process, self.processes = process, processes
        self.faults_of = faults_of
        """The function that checks a row against the model."""
        self.next, self.rows = 0, self._rows()

    def refusing(self, faults_of: Callable[[Record], list[str]]) -> StreamedRows:
        return StreamedRows(self.dataset, self.reader, self.config, self.seed, faults_of, self.process, self.processes)

    def of_process(self, process: int, processes: int) -> StreamedRows:
        """Every `processes`-th row, starting at number `process`: the other rows are neither decoded nor checked."""
        return StreamedRows(self.dataset, self.reader, self.config, self.seed, self.faults_of, process, processes)

    def groups(self) -> list[Hashable]:
        return []

    def fingerprint(self) -> str:
        return f"stream of {self.reader.file}, {self.config.shuffle_buffer} rows shuffled, seed {self.seed}"

    def image_fingerprint(self) -> None:
        return None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < self.next:
            self.next, self.rows = 0, self._rows()
        while True:
            record = next(self.rows)
            self.next += 1
            if self.next > index:
                return record

    def _rows(self) -> Iterator[Record]:
        number = itertools.count()  # across epochs, whose lengths need not be multiples of the number of processes
        unusable = 0  # rows of this process since the last usable one
        for epoch in itertools.count():
            self.dataset.set_epoch(epoch)
            rows = 0
            for rows, cells in enumerate(self.dataset, start=1):
                if next(number) % self.processes != self.process:
                    continue
                record, faults = CheckedReader(self.reader, self.config)(rows - 1, cells)
                self.reader.log()
                faults = faults or self.faults_of(record)
                if not faults:
                    unusable = 0
                    yield record
                    continue
                unusable += 1
                if self.config.on_bad_row == "fail":
                    raise DataError(f"{record.place}: {'; '.join(faults)}; data.on_bad_row=drop skips such rows")
                own.warning("skipped %s: %s", record.place, "; ".join(faults))
            if unusable >= rows:  # a whole pass, or an empty stream
                raise DataError(f"{self.reader.file}: the stream has no usable row")
