"""The training rows as optimizer steps: order, layout and cut into micro-batches."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.batching.layout import Batch, padded, shared
from vlmtune.batching.order import ByTokens, InOrder, Order, micro_batches
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.errors import ConfigError, VlmtuneError
from vlmtune.launch.signals import SIGNALS
from vlmtune.prompt.encode import Encoder

TOLD = (VlmtuneError, OSError, MemoryError)


class Told(Dataset[Any]):
    """The items of `batches`, with a row's error as an item: raised in a worker process, it would come back wrapped in
    torch's own text.
    """

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except TOLD as error:
            return error


class Batches(Dataset[list[Batch]]):
    """Item n holds this rank's micro-batches of optimizer step n."""

    def __init__(self, encoder: Encoder, records: Records, trainer: TrainerConfig, engine: Any):
        self.encoder, self.records, self.trainer = encoder, records, trainer
        self.rank, self.ranks, self.on_cpu = engine.process_index, engine.num_processes, engine.device.type == "cpu"
        self.rows_per_step = trainer.batch_size * trainer.gradient_accumulation_steps * self.ranks
        self.streamed = records.streamed
        self.groups = groups_of(records, encoder)
        self.share = False
        self.share_answers = False
        """Whether evaluation may generate with each image once."""
        if trainer.batch_tokens and self.streamed:
            raise ConfigError(
                "trainer.batch_tokens: the lengths of a stream's rows aren't known; use trainer.batch_size"
            )
        self.lengths = encoder.lengths(records) if trainer.batch_tokens else []
        self.order = self._order()
        self.total_steps = trainer.max_steps or self.order.steps_in(trainer.epochs)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to see the rows that a straight one sees."""
        return {
            "rows per step": self.rows_per_step,
            "tokens per forward pass": self.trainer.batch_tokens,
            "training rows": len(self.records),
            "data fingerprint": self.fingerprint,
            "image content": self.image_fingerprint,
            "seed": self.trainer.seed,
            "share_prefix": self.share,
            "steps in all": self.total_steps,
        }

    @cached_property
    def fingerprint(self) -> str:
        return self.records.fingerprint()

    @cached_property
    def image_fingerprint(self) -> str | None:
        return self.records.image_fingerprint()

    def _order(self) -> Order | InOrder | ByTokens:
        if self.streamed:
            return InOrder(self.rows_per_step)
        seed = self.trainer.seed
        if self.trainer.batch_tokens:
            return ByTokens(
                self.lengths,
                self.groups,
                batch_tokens=self.trainer.batch_tokens,
                passes_per_step=self.trainer.gradient_accumulation_steps * self.ranks,
                seed=seed,
                by_group=self.share,
            )
        return Order(self.groups, rows_per_step=self.rows_per_step, seed=seed, by_group=self.share)

    def sample(self, count: int) -> list[Record]:
        """Some rows that training begins with, no more than fit into one forward pass."""
        return [self.records[i] for i in self.order.step(0)[: min(count, self.trainer.batch_size)]]

    def around(self, record: Record, length: int) -> Batch:
        """A micro-batch of the run's own size and layout with `record`, of `length` tokens: beside the first rows
        of the run, or as often as `trainer.batch_tokens` holds it.
        """
        if self.trainer.batch_tokens:
            rows = [record] * max(self.trainer.batch_tokens // length, 1)
        else:
            rows = [record, *self.sample(self.trainer.batch_size)[1:]]
        return (shared if self.share else padded)(self.encoder, rows)

    def use_layout(self, *, share: bool) -> None:
        """Choose between padded batches and shared ones, which need rows of a group to stay together."""
        self.share = share
        self.order = self._order()
        self.total_steps = self.trainer.max_steps or self.order.steps_in(self.trainer.epochs)

    def probes(self, most: int) -> list[list[Record]]:
        """As `probes`, of the training rows."""
        return probes(self.encoder, self.records, self.groups, most)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> list[Batch]:
        rows = self.order.step(step)
        accumulation = self.trainer.gradient_accumulation_steps
        make = shared if self.share else padded
        if isinstance(self.order, ByTokens):
            parts = self.order.passes(step, self.rank, accumulation)
        else:
            parts = micro_batches(rows, batch_size=self.trainer.batch_size, accumulation=accumulation, rank=self.rank)
        own = [part for part in parts if part]
        if own:
            return [make(self.encoder, [self.records[i] for i in part]) for part in own]
        # an epoch's last step may leave this rank without rows, but the others wait for its gradients
        return [make(self.encoder, [self.records[i] for i in rows[:1]]).without_labels()]

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """Micro-batches of all steps from `first` on, prepared ahead by worker processes where that pays."""
        workers = self.trainer.num_workers
        if self.streamed or self.encoder.image_cache is not None:  # workers would each read a part, or keep their own
            workers = 0
        if workers is None:
            workers = 0 if self.on_cpu else 4  # on a CPU they would take the cores that compute
        loader = DataLoader(
            Told(self),
            batch_size=None,
            sampler=range(first, self.total_steps),
            num_workers=workers,
            pin_memory=not self.on_cpu,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or it draws its seed from the random state that a resume restored
        )
        for item in loader:
            if isinstance(item, TOLD):
                raise item
            yield item


def groups_of(records: Records, encoder: Encoder) -> Sequence[Hashable]:
    """What each row shares with others: images and all that is written in front of them, or the images alone where
    rows are read when asked for. Nothing of a stream is known before it is read.
    """
    if records.on_demand:
        return records.groups()
    return [encoder.prompt.group(record) for record in records]


KINDS = 4
"""Shapes of conversation that are probed."""


def probes(encoder: Encoder, records: Sequence[Record], groups: Sequence[Hashable], most: int) -> list[list[Record]]:
    """Per shape of conversation up to `most` rows, at least two each of up to two images that several rows show: the
    ones with the shortest and the longest question. The rarest shapes come first: what breaks a layout is seldom usual.
    """
    counts = Counter(group for group in groups if group is not None)
    rows_of: dict[Hashable, list[int]] = {group: [] for group, count in counts.most_common(1000) if count > 1}
    for row, group in enumerate(groups):
        if group in rows_of:
            rows_of[group].append(row)
    of_shape: dict[Any, list[list[int]]] = {}
    for rows in rows_of.values():
        first = records[rows[0]]
        of_shape.setdefault((encoder.prompt.shape(first), first.system is not None), []).append(rows)
    found = []
    for kinds in sorted(of_shape.values(), key=len)[:KINDS]:
        chosen = [records[row] for rows in kinds[:2] for row in _unlike(records, rows, max(most // 2, 2))]
        found.append(chosen[: max(most, 2)])
    return found


def _unlike(records: Sequence[Record], rows: Sequence[int], most: int) -> list[int]:
    """Up to `most` of `rows`, by the length of their questions: from both ends."""
    ordered = sorted(rows[:100], key=lambda row: len(records[row].question))
    return [ordered[-(n // 2) - 1] if n % 2 else ordered[n // 2] for n in range(min(most, len(ordered)))]


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the main process, which ends its step; it would miss a worker that died."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
