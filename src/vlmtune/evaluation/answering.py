"""One process's rows of an evaluation: loss and answers, batch by batch.

Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.batching.layout import Batch, Layout, lay_out
from vlmtune.batching.preparation import Preparation
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.evaluation.drafts import Draft
from vlmtune.evaluation.generate import generate
from vlmtune.evaluation.prepared import Prepared
from vlmtune.launch.engine import Engine
from vlmtune.objectives.next_token import logits_in_pieces


@dataclass
class Found:
    """Results of some rows."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    """Summed losses of the pieces of each batch, by the number of its first row."""
    tokens: int = 0
    """Supervised tokens."""
    answers: dict[int, str] = field(default_factory=dict)
    """By row number."""
    stopped: int | None = None
    """The number of a signal that asks to stop."""
    short: bool = False
    """A batch did not fit into memory."""

    def add(self, other: Found) -> None:
        self.short |= other.short
        self.losses |= other.losses
        self.tokens += other.tokens
        self.answers |= other.answers

    @property
    def loss(self) -> float:
        """Summed over all rows in their order, so that it does not depend on the number of processes."""
        total = 0.0
        for row in sorted(self.losses):
            for value in self.losses[row]:
                total += value
        return total


class Answering:
    """Passes batches through the model. Rows whose answers the loss does not reveal wait until they fill a batch."""

    def __init__(
        self,
        model: Any,
        prepared: Prepared,
        config: Config,
        engine: Engine,
        layout: Layout,
        advance: Callable[[int], None],
    ):
        self.model, self.prepared, self.config, self.engine, self.layout = model, prepared, config, engine, layout
        self.advance = advance
        self.preparation = Preparation.of(model, engine)
        self.draft = Draft(model, prepared.encoder, config.generation)
        self.found, self.waiting = Found(), dict[int, Record]()
        self.losses: dict[int, list[Tensor]] = {}

    def add(self, rows: Sequence[int], records: Sequence[Record]) -> None:
        """Evaluate a batch, and generate as soon as enough rows wait for it."""
        batch = self.preparation(lay_out(self.prepared.encoder, records, self.layout))
        self.losses[rows[0]], likely = loss_and_likely(self.model, batch, self.engine, self.draft.never)
        self.found.tokens += len(likely)
        answers = self.draft.answers(records, batch, likely)
        for row, record, answer in zip(rows, records, answers, strict=True):
            if answer is None:
                self.waiting[row] = record
            else:
                self.found.answers[row] = answer
        self.advance(len(answers) - answers.count(None))
        while len(self.waiting) >= self.config.trainer.eval_batch_size:
            self._generate()
        self.prepared.let_go([*self.waiting.values()])

    def finish(self) -> None:
        """Generate the answers of all rows that still wait."""
        while self.waiting:
            self._generate()

    def _generate(self) -> None:
        size = self.config.trainer.eval_batch_size
        rows = [*self.waiting][:size]
        answers = generate(
            self.model,
            self.prepared.encoder,
            [self.waiting.pop(row) for row in rows],
            self.config.generation,
            batch_size=size,
            autocast=self.engine.autocast,
            share=self.layout.share_answers,
            advance=self.advance,
        )
        self.found.answers |= zip(rows, answers, strict=True)

    @property
    def may_halve(self) -> bool:
        """Whether smaller batches are an answer to one that does not fit into memory."""
        return self.config.trainer.auto_micro_batch and self.config.trainer.eval_batch_size > 1

    def taken(self, stopped: int | None, short: bool) -> Found:
        """What was found since the last call. `stopped`: the number of a signal that asks to stop. `short`: the last
        batch did not fit into memory.
        """
        found, losses = self.found, self.losses
        self.found, self.losses = Found(), {}
        if losses:
            values = iter(torch.stack([value for each in losses.values() for value in each]).tolist())
            found.losses = {row: [next(values) for _ in each] for row, each in losses.items()}
        found.stopped, found.short = stopped, short
        return found


PIECE = 256
"""Number of tokens whose logits are held in float32 at once."""


@torch.no_grad()
def loss_and_likely(model: Any, batch: Batch, engine: Engine, never: list[int]) -> tuple[list[Tensor], list[int]]:
    """Summed losses of the pieces of a batch, on the device, and the most likely token other than `never` at each of
    the N supervised positions, which is all that is read from the device.
    """
    was_training = model.training
    model.eval()
    losses, likely = [], []
    with engine.autocast():
        for logits, targets in logits_in_pieces(model, batch.to(engine.device)):
            for part, wanted in zip(logits.split(PIECE), targets.split(PIECE), strict=True):
                values = part.float()
                losses.append(F.cross_entropy(values, wanted, reduction="sum"))
                values[:, never] = -math.inf
                likely.append(values.argmax(-1))
    model.train(was_training)
    return losses, torch.cat(likely).tolist()
