"""The training rows as optimizer steps: order, layout and cut into micro-batches."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune import environment
from vlmtune.config import TrainerConfig
from vlmtune.data.batch import Batch, padded, shared
from vlmtune.data.encode import Encoder
from vlmtune.data.records import Record
from vlmtune.data.sampler import ByTokens, InOrder, Order, micro_batches
from vlmtune.errors import ConfigError


class Batches(Dataset[list[Batch]]):
    """Item n holds this rank's micro-batches of optimizer step n."""

    def __init__(self, encoder: Encoder, records: Sequence[Record], trainer: TrainerConfig, engine: Any):
        self.encoder, self.records, self.trainer = encoder, records, trainer
        self.rank, self.ranks, self.on_cpu = engine.process_index, engine.num_processes, engine.device.type == "cpu"
        self.rows_per_step = trainer.batch_size * trainer.gradient_accumulation_steps * self.ranks
        self.streamed = is_streamed(records)
        self.groups = groups_of(records)
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
        return environment.fingerprint(self.records)

    @cached_property
    def image_fingerprint(self) -> str | None:
        return environment.image_fingerprint(self.records)

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

    def use_layout(self, *, share: bool) -> None:
        """Choose between padded batches and shared ones, which need rows of a group to stay together."""
        self.share = share
        self.order = self._order()
        self.total_steps = self.trainer.max_steps or self.order.steps_in(self.trainer.epochs)

    def repeated(self, most: int) -> list[Record]:
        """As `repeated`, of the training rows."""
        return repeated(self.records, self.groups, most)

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
            self,
            batch_size=None,
            sampler=range(first, self.total_steps),
            num_workers=workers,
            pin_memory=not self.on_cpu,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or it draws its seed from the random state that a resume restored
        )
        return iter(loader)


def is_streamed(records: Sequence[Record]) -> bool:
    """Whether rows are read when their turn comes."""
    return bool(getattr(records, "in_order", False))


def groups_of(records: Sequence[Record]) -> list[Hashable]:
    """What each row shows, as far as known without reading a stream."""
    return [] if is_streamed(records) else getattr(records, "groups", None) or [r.group for r in records]


def repeated(records: Sequence[Record], groups: Sequence[Hashable], most: int) -> list[Record]:
    """Up to `most` rows, at least two each of up to two images that several rows show; empty if there are none."""
    counts = Counter(group for group in groups if group is not None).most_common(2)
    found = []
    for group, _ in [(group, n) for group, n in counts if n > 1]:
        rows = [i for i, other in enumerate(groups) if other == group]
        found += [records[i] for i in rows[: max(most // 2, 2)]]
    return found[: max(most, 2)]


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the main process, which ends its step; it would miss a worker that died."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
