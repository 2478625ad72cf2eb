"""Loads the training rows as micro-batches, prepared in advance."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlmtune.batching.layout import Batch, Layout, lay_out
from vlmtune.batching.order import Plan
from vlmtune.batching.preparation import AS_IT_IS, Preparation
from vlmtune.batching.workers import Workers, available, in_shared_memory
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.errors import VlmtuneError
from vlmtune.launch.engine import Engine
from vlmtune.launch.signals import SIGNALS
from vlmtune.launch.steps import step_size
from vlmtune.prompt.encode import Encoder

FAULTS = (VlmtuneError, OSError, MemoryError)


class Loader:
    """Makes this process's micro-batches in order, one at a time: a whole step is never held in memory."""

    def __init__(
        self,
        encoder: Encoder,
        records: Records,
        plan: Plan,
        layout: Layout,
        trainer: TrainerConfig,
        engine: Engine,
        model: Any = None,
    ):
        """`model`: what batches are prepared for; its weights are not kept. None: as the processor returns them."""
        self.encoder, self.records, self.layout, self.trainer = encoder, records, layout, trainer
        self.preparation = AS_IT_IS if model is None else Preparation.of(model, engine)
        self.order, self.total_steps, self.by_group = plan.order, plan.total_steps, plan.by_group
        self.process, self.processes = engine.process_index, engine.num_processes
        self.own, self.on_cpu = records.of_process(self.process, self.processes), engine.device.type == "cpu"
        self.largest = 0
        """Bytes of the largest micro-batch that `around` made."""
        self.halvings = 0
        self.spare: Record | None = None
        """A row that this process has read: what an empty micro-batch is made of."""

    def halve(self) -> None:
        """From here on, make micro-batches of half as many rows. A step's rows stay the same."""
        self.order.halve()
        self.halvings += 1
        self.__dict__.pop("expected_tokens", None)

    def micro_batches(self, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of all steps from `first_step` on. `ends_step` marks the last one of each step."""
        workers = self._workers(first_step)
        loader = DataLoader(
            _Items(self),
            batch_size=None,
            sampler=self._micro_batch_numbers(first_step),
            num_workers=workers.count,
            prefetch_factor=workers.ahead or None,
            pin_memory=not self.on_cpu,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it draws a seed from the random state that a resume restored
        )
        for item in loader:
            if isinstance(item, FAULTS):
                raise item
            yield item

    def _workers(self, first_step: int) -> Workers:
        asked = worker_count(self.trainer, self.records, self.encoder, on_cpu=self.on_cpu)
        if not asked or first_step >= self.total_steps:
            return Workers(0, 0)
        return available(asked, _Items(self), self.largest or self.make(first_step, 0).bytes, self.processes)

    def _micro_batch_numbers(self, first_step: int) -> Iterator[tuple[int, int]]:
        """(step, index of the micro-batch in the step) of all micro-batches to make."""
        for step in range(first_step, self.total_steps):
            yield from ((step, number) for number in range(len(self.order.passes(step, self.process))))

    def make(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of a step. An empty one is a row without labels: the others wait for its gradients."""
        parts = self.order.passes(step, self.process)
        rows = [self.own[row] for row in parts[number]]
        self.spare = rows[0] if rows else self.spare or self.own[0]  # a stream that goes back reads all again
        batch = dataclasses.replace(self._lay_out(rows or [self.spare]), ends_step=number + 1 == len(parts))
        return batch if rows else batch.without_labels()

    @cached_property
    def expected_tokens(self) -> float:
        """Estimate of the supervised tokens in one process's step, from the first rows."""
        parts = self.order.passes(0, 0)
        if len(parts) == 1:
            return 1.0  # each micro-batch is a whole step, whose count is known
        rows = self._first_rows()
        return self._lay_out(rows).supervised / len(rows) * sum(map(len, parts))

    def due(self, every: int | str | None, step: int) -> bool:
        """Whether something that happens every N steps, or every `epoch`, is due after `step` steps."""
        if every is None:
            return False
        return self.order.ends_epoch(step) if every == "epoch" else step % int(every) == 0

    def _first_rows(self) -> list[Record]:
        return [self.records[row] for row in self.order.passes(0, 0)[0]]

    def around(self, row: int) -> Batch:
        """The micro-batch of the first epoch, of whichever process, that has this row of the training rows."""
        step = self.order.step_of(row)
        parts = (part for process in range(self.processes) for part in self.order.passes(step, process))
        batch = self._lay_out([self.records[each] for each in next(part for part in parts if row in part)])
        self.largest = max(self.largest, batch.bytes)
        return batch

    def _lay_out(self, rows: list[Record]) -> Batch:
        return self.preparation(lay_out(self.encoder, rows, self.layout))

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to see the same rows as an uninterrupted one."""
        trainer = self.trainer
        return {
            "passes per step" if trainer.batch_tokens else "rows per step": step_size(trainer, self.processes),
            "tokens per forward pass": trainer.batch_tokens,
            "training rows": len(self.records),
            "data fingerprint": self.fingerprint,
            "image content": self.image_fingerprint,
            "seed": trainer.seed,
            "share_prefix": self.by_group,
            "steps in all": self.total_steps,
        }

    @cached_property
    def fingerprint(self) -> str:
        return self.records.fingerprint()

    @cached_property
    def image_fingerprint(self) -> str | None:
        return self.records.image_fingerprint()


def worker_count(trainer: TrainerConfig, records: Sequence[Record], encoder: Encoder, *, on_cpu: bool) -> int:
    """Number of worker processes. 0 for a stream, since each worker would read only a part of it, and with an image
    cache, since each worker would fill its own.
    """
    if getattr(records, "streamed", False) or encoder.image_cache is not None:
        return 0
    if trainer.num_workers is not None:
        return trainer.num_workers
    return 0 if on_cpu else 4  # on a CPU they would compete with the model for cores


class _Items(Dataset[Any]):
    """The dataset that worker processes run. An error is returned as an item: raised in a worker, torch would wrap it
    in its own message.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getitem__(self, place: tuple[int, int]) -> Any:
        try:
            batch = self.loader.make(*place)
            return batch if get_worker_info() is None else in_shared_memory(batch)
        except FAULTS as error:
            return error


def ignore_signals(worker: int) -> None:
    """Only the main process handles signals to the process group: it finishes its step and needs its workers for it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
