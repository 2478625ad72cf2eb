"""The training rows as a stream of micro-batches, prepared ahead."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.batching.layout import Batch, Layout, lay_out
from vlmtune.batching.order import Plan
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.errors import VlmtuneError
from vlmtune.launch.signals import SIGNALS
from vlmtune.prompt.encode import Encoder

FAULTS = (VlmtuneError, OSError, MemoryError)


class Loader:
    """Makes this process's micro-batches of each step, in order, one at a time: a step never waits as a whole."""

    def __init__(
        self,
        encoder: Encoder,
        records: Records,
        plan: Plan,
        layout: Layout,
        trainer: TrainerConfig,
        engine: Any,
    ):
        self.encoder, self.records, self.layout, self.trainer = encoder, records, layout, trainer
        self.order, self.total_steps = plan.order, plan.total_steps
        self.process, self.processes = engine.process_index, engine.num_processes
        self.own, self.on_cpu = records.of_process(self.process, self.processes), engine.device.type == "cpu"

    def micro_batches(self, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of all steps from `first_step` on; the last of each step has `ends_step`."""
        loader = DataLoader(
            _Items(self),
            batch_size=None,
            sampler=self._places(first_step),
            num_workers=self._workers(),
            pin_memory=not self.on_cpu,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or it draws its seed from the random state that a resume restored
        )
        for item in loader:
            if isinstance(item, FAULTS):
                raise item
            yield item

    def _workers(self) -> int:
        """Processes that prepare ahead. None for a stream, of which each would read a part, or beside a cache of
        images, of which each would keep its own."""
        if self.records.streamed or self.encoder.image_cache is not None:
            return 0
        if self.trainer.num_workers is not None:
            return self.trainer.num_workers
        return 0 if self.on_cpu else 4  # on a CPU they would take the cores that compute

    def _places(self, first_step: int) -> Iterator[tuple[int, int]]:
        """(step, number of the micro-batch in it) of all that is to be made."""
        for step in range(first_step, self.total_steps):
            count = len(self.order.passes(step, self.process))
            yield from ((step, number) for number in range(max(count, 1)))

    def make(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of a step. A process without rows in it gets one row that nothing is learned from, since
        the others wait for its gradients."""
        parts = self.order.passes(step, self.process)
        rows = parts[number] if parts else self.order.step(step)[:1]
        batch = lay_out(self.encoder, [self.own[row] for row in rows], self.layout)
        batch = dataclasses.replace(batch, ends_step=number + 1 >= len(parts))
        return batch if parts else batch.without_labels()

    @cached_property
    def expected_tokens(self) -> float:
        """Supervised tokens of one process's step, from what the first rows have: the right size, not the count."""
        if self.trainer.gradient_accumulation_steps == 1:
            return 1.0  # each micro-batch ends its step, whose count is then known
        rows = self._first_rows()
        return self._lay_out(rows).supervised / len(rows) * sum(map(len, self.order.passes(0, 0)))

    def due(self, every: int | str | None, step: int) -> bool:
        """Whether something that is done every N steps, or every `epoch`, is due after `step` steps."""
        if every is None:
            return False
        return self.order.ends_epoch(step) if every == "epoch" else step % int(every) == 0

    def _first_rows(self) -> list[Record]:
        return [self.records[row] for row in self.order.step(0)[: self.trainer.batch_size]]

    def around(self, record: Record, length: int) -> Batch:
        """A micro-batch of the run's own size with `record`, which has `length` tokens: beside the first rows of the
        run, or as often as `trainer.batch_tokens` holds it.
        """
        if self.trainer.batch_tokens:
            return self._lay_out([record] * max(self.trainer.batch_tokens // length, 1))
        return self._lay_out([record, *self._first_rows()[1:]])

    def _lay_out(self, rows: list[Record]) -> Batch:
        return lay_out(self.encoder, rows, self.layout)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to see the rows that a straight one sees."""
        trainer = self.trainer
        return {
            "rows per step": trainer.batch_size * trainer.gradient_accumulation_steps * self.processes,
            "tokens per forward pass": trainer.batch_tokens,
            "training rows": len(self.records),
            "data fingerprint": self.fingerprint,
            "image content": self.image_fingerprint,
            "seed": trainer.seed,
            "share_prefix": self.layout.share,
            "steps in all": self.total_steps,
        }

    @cached_property
    def fingerprint(self) -> str:
        return self.records.fingerprint()

    @cached_property
    def image_fingerprint(self) -> str | None:
        return self.records.image_fingerprint()


class _Items(Dataset[Any]):
    """What worker processes run. A row's fault is an item too: raised in a worker, it would come back wrapped in the
    text of torch.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getitem__(self, place: tuple[int, int]) -> Any:
        try:
            return self.loader.make(*place)
        except FAULTS as error:
            return error


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the main process, which ends its step; it would miss a worker that died."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
