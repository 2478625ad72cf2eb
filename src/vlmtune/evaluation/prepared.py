"""Batches of rows to evaluate or to answer, whose images worker processes prepare in advance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.batching.loader import FAULTS, ignore_signals, worker_count
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.launch.engine import Engine
from vlmtune.prompt.cache_folder import Entry
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.recent_images import RecentImages, key_of

AHEAD = 1
"""Batches that each worker prepares in advance."""


def dealt(rows: int, size: int, processes: int = 1) -> list[range]:
    """The rows in batches of at most `size`, which processes take in turn: neighbours stay together, since they often
    show the same image, and each process gets rows from all over the split. Several processes get equally many
    batches, as long as there are rows.
    """
    if processes > 1:
        turns = math.ceil(rows / (size * processes))
        size = math.ceil(rows / max(turns * processes, 1))
    return [range(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]


class Prepared:
    """Batches of some rows, in order. `encoder` has the image tensors of the batch at hand; it prepares what is missing
    itself, such as images that a worker could not open: its error names the row.

    An encoder with a cache of its own is used as it is.
    """

    def __init__(
        self,
        encoder: Encoder,
        records: Sequence[Record],
        batches: Sequence[Sequence[int]],
        trainer: TrainerConfig,
        engine: Engine,
    ):
        self.records, self.batches = records, batches
        self.recent = RecentImages() if encoder.image_cache is None else None
        self.encoder = encoder if self.recent is None else encoder.keeping(self.recent)
        found = worker_count(trainer, records, encoder, on_cpu=engine.device.type == "cpu")
        self.workers = min(found, max(len(batches) - 1, 0))

    def __iter__(self) -> Iterator[tuple[Sequence[int], list[Record]]]:
        """The row numbers and the records of each batch."""
        made = self._in_advance() if self.workers else [[]] * len(self.batches)
        for rows, entries in zip(self.batches, made, strict=True):
            records = [self.records[row] for row in rows]
            if self.recent is not None:
                for place, entry in entries:
                    self.recent.put(records[place].images, entry)
            yield rows, records

    def let_go(self, waiting: Sequence[Record] = ()) -> None:
        """Release images of earlier batches, except those of the rows `waiting`."""
        if self.recent is not None:
            self.recent.let_go(waiting=[record.images for record in waiting])

    def _in_advance(self) -> Iterator[list[tuple[int, Entry]]]:
        loader = DataLoader(
            _Images(self.encoder, self.records, self.batches),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it draws a seed from the random state of the run
        )
        for entries in loader:  # copied, because each tensor of a worker holds a file open
            yield [(place, _copied(entry)) for place, entry in entries]


class _Images(Dataset[Any]):
    """The dataset that worker processes run: the images of each batch, with the places of their rows in it."""

    def __init__(self, encoder: Encoder, records: Sequence[Record], batches: Sequence[Sequence[int]]):
        self.encoder, self.records, self.batches = encoder, records, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[tuple[int, Entry]]:
        """Images that the last row of the batch before shows are left out: they are prepared with that batch."""
        before = [self.records[row] for row in self.batches[number - 1][-1:]] if number else []
        seen = {key_of(record.images) for record in before}
        recent = RecentImages()
        images = self.encoder.keeping(recent).images
        entries: list[tuple[int, Entry]] = []
        for place, row in enumerate(self.batches[number]):
            record = self.records[row]
            if not record.images or key_of(record.images) in seen:
                continue
            seen.add(key_of(record.images))
            with suppress(*FAULTS):
                images.of([record], [None])
            if entry := recent.get(record.images):
                entries.append((place, entry))
        return entries


def _as_it_is(item: Any) -> Any:
    return item


def _copied(entry: Entry) -> Entry:
    return dataclasses.replace(entry, inputs={name: tensor.clone() for name, tensor in entry.inputs.items()})
