"""Loss and metrics over a split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune import display
from vlmtune.batching.layout import PLAIN, Layout
from vlmtune.config.schema import Config, TrainerConfig
from vlmtune.data.records import Record
from vlmtune.evaluation.answering import Answering, Found
from vlmtune.evaluation.prepared import Prepared, dealt
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.launch.signals import EvaluationStopped
from vlmtune.memory import TRAINING, is_out_of_memory, noted
from vlmtune.metrics import resolve, score
from vlmtune.prompt.encode import Encoder

log = logging.getLogger("vlmtune")
ROUND = 16
"""Batches after which processes exchange their results: none then waits long for another, whose rows take longer."""


@dataclass
class Evaluation:
    """A model's loss and scores on some rows."""

    metrics: dict[str, float]
    """`loss` per supervised token, and the task's metrics averaged over the rows."""
    predictions: list[str]
    scores: list[dict[str, float]]
    """The task's metrics for each row."""


def evaluate(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    config: Config,
    engine: Engine,
    *,
    title: str,
    layout: Layout = PLAIN,
    stop: Callable[[], int | None] = lambda: None,
    done: Callable[[int, list[str]], None] | None = None,
) -> Evaluation:
    """Answer and score all records; the processes take turns with their batches.

    `stop`: called after each batch, returns the number of a signal that asks to stop, or None; every rank then raises
    `signals.EvaluationStopped`.
    `done`: called with the first row's number and the answers of the rows from there on, in order.

    With `trainer.auto_micro_batch`, `trainer.eval_batch_size` is halved until a batch fits into memory.
    """
    told, was_training, trainer = Told(done), model.training, config.trainer
    while True:
        batches = dealt(len(records), trainer.eval_batch_size, engine.num_processes)
        own = batches[engine.process_index :: engine.num_processes]
        when = f"in an evaluation, {trainer.eval_batch_size} rows at a time"
        with (
            display.bar(title, sum(map(len, own)), show=engine.is_main_process) as advance,
            noted(when, model=model, useless=TRAINING),
        ):
            prepared = Prepared(encoder, records, own, trainer, engine)
            found = _found(Answering(model, prepared, config, engine, layout, advance), len(batches), stop, told)
        if not found.short:
            break
        _halve(trainer)
        model.train(was_training)  # the batch that failed left it in evaluation mode
    predictions = [*_from(found.answers, 0)]
    means, scores = score(resolve(config.task.metrics), predictions, [list(record.answers) for record in records])
    return Evaluation({"loss": found.loss / max(found.tokens, 1), **means}, predictions, scores)


@dataclass
class Told:
    """Passes answers on to `done`, each once."""

    done: Callable[[int, list[str]], None] | None
    rows: int = 0
    """How many rows are told."""

    def __call__(self, found: Found) -> None:
        fresh = [*_from(found.answers, self.rows)]
        if self.done is not None and fresh:
            self.done(self.rows, fresh)
            self.rows += len(fresh)


def _halve(trainer: TrainerConfig) -> None:
    size = trainer.eval_batch_size
    trainer.eval_batch_size = size // 2
    session.free_memory()
    log.warning("%d rows at a time do not fit into memory: the evaluation starts again with %d", size, size // 2)


def _found(answering: Answering, batches: int, stop: Callable[[], int | None], told: Told) -> Found:
    """What all processes find together, `short` if a batch did not fit into memory on one of them."""
    found, processes = Found(), answering.engine.num_processes
    for each in _rounds(answering, math.ceil(batches / processes / ROUND), stop, whole=told.done is not None):
        found.add(_over_ranks(each, answering.engine))
        if found.short:
            break
        told(found)
    return found


def _rounds(answering: Answering, rounds: int, stop: Callable[[], int | None], *, whole: bool) -> Iterator[Found]:
    """What this process finds in each round. All processes have the same number of rounds, some perhaps without rows;
    a signal ends the last one. `whole`: no row waits for the next round to fill a batch.
    """
    batches = iter(answering.prepared)
    for number in range(rounds):
        short = False
        try:
            for _, (rows, records) in zip(range(ROUND), batches, strict=False):
                answering.add(rows, records)
                if stop() is not None:
                    break
            else:
                if whole or number == rounds - 1:
                    answering.finish()
        except Exception as error:
            short = answering.may_halve and is_out_of_memory(error)
            if not short:
                raise
        yield answering.taken(stop(), short)


def _over_ranks(own: Found, engine: Engine) -> Found:
    """What all ranks found together. Raises `EvaluationStopped` if a signal reached one of them: all must stop."""
    from accelerate.utils import gather_object

    together = Found()
    for found in [own] if engine.num_processes == 1 else gather_object([own]):
        if found.stopped is not None:
            raise EvaluationStopped(found.stopped)
        together.add(found)
    return together


def _from(answers: dict[int, str], row: int) -> Iterator[str]:
    """The answers from `row` on, up to the first row that has none yet."""
    while row in answers:
        yield answers[row]
        row += 1
