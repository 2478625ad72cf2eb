"""Batches of rows to evaluate or to answer, whose images worker processes prepare in advance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlmtune.batching.loader import FAULTS, ignore_signals, worker_count
from vlmtune.batching.workers import available, in_shared_memory
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.display import own
from vlmtune.launch.engine import Engine
from vlmtune.prompt.cache_folder import Entry
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.recent_images import RecentImages, key_of


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
        self.asked = worker_count(trainer, records, encoder, on_cpu=engine.device.type == "cpu")
        self.processes = engine.num_processes

    def __iter__(self) -> Iterator[tuple[Sequence[int], list[Record]]]:
        """The row numbers and the records of each batch."""
        asked = min(self.asked, len(self.batches) - 1)
        made = repeat(Images()) if self.recent is None or asked < 1 else self._in_advance(asked)
        for rows, images in zip(self.batches, made, strict=False):
            records = [self.records[row] for row in rows]
            if self.recent is not None:
                for place, entry in images.entries.items():
                    self.recent.put(records[place].images, entry)
            yield rows, records

    def let_go(self, waiting: Sequence[Record] = ()) -> None:
        """Release images of earlier batches, except those of the rows `waiting`."""
        if self.recent is not None:
            self.recent.let_go(waiting=[record.images for record in waiting])

    def _in_advance(self, asked: int) -> Iterator[Images]:
        items = _Items(self.encoder, self.records, self.batches)
        first = items[0]  # made here: its size decides how many workers fit into shared memory
        workers = available(asked, items, first.bytes, self.processes)
        loader = DataLoader(
            items,
            batch_size=None,
            sampler=range(1, len(self.batches)),
            num_workers=workers.count,
            prefetch_factor=workers.ahead or None,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it draws a seed from the random state of the run
        )
        rest = iter(loader)
        yield first
        for item in rest:
            if isinstance(item, FAULTS):  # this process prepares them by itself
                own.warning("images of an evaluation are prepared later, one batch at a time: %s", item)
            yield Images() if isinstance(item, FAULTS) else item.copied()


@dataclass(frozen=True)
class Images:
    """The images of a batch's rows, by their places in the batch."""

    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def share_memory(self) -> Images:
        return self._each(Tensor.share_memory_)

    def copied(self) -> Images:
        """Out of shared memory, where each tensor holds a file open."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Images:
        def changed(entry: Entry) -> Entry:
            return replace(entry, inputs={name: change(tensor) for name, tensor in entry.inputs.items()})

        return Images({place: changed(entry) for place, entry in self.entries.items()})


class _Items(Dataset[Any]):
    """The dataset that worker processes run: the images of each batch. An error is returned as an item."""

    def __init__(self, encoder: Encoder, records: Sequence[Record], batches: Sequence[Sequence[int]]):
        self.encoder, self.records, self.batches = encoder, records, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        images = Images(self._entries(number))
        try:
            return images if get_worker_info() is None else in_shared_memory(images)
        except FAULTS as error:
            return error

    def _entries(self, number: int) -> dict[int, Entry]:
        """Without images that the last row of the batch before shows, since they are prepared with that batch, and
        without those that can't be: the main process tries again, and its error names the row.
        """
        before = [self.records[row] for row in self.batches[number - 1][-1:]] if number else []
        seen = {key_of(record.images) for record in before}
        recent = RecentImages()
        images = self.encoder.keeping(recent).images
        entries: dict[int, Entry] = {}
        for place, row in enumerate(self.batches[number]):
            record = self.records[row]
            if not record.images or key_of(record.images) in seen:
                continue
            seen.add(key_of(record.images))
            with suppress(*FAULTS):
                images.of([record], [None])
            if entry := recent.get(record.images):
                entries[place] = entry
        return entries


def _as_it_is(item: Any) -> Any:
    return item
