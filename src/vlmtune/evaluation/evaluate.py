"""Loss and metrics over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune import display
from vlmtune.batching.layout import PLAIN, Layout
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.evaluation.answering import Answering, Found
from vlmtune.evaluation.prepared import Prepared, dealt
from vlmtune.launch.engine import Engine
from vlmtune.launch.signals import EvaluationStopped
from vlmtune.metrics import resolve, score
from vlmtune.prompt.encode import Encoder

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
    """
    batches = dealt(len(records), config.trainer.eval_batch_size, engine.num_processes)
    own = batches[engine.process_index :: engine.num_processes]
    prepared = Prepared(encoder, records, own, config.trainer, engine)
    found, written = Found(), 0
    with display.bar(title, sum(map(len, own)), show=engine.is_main_process) as advance:
        answering = Answering(model, prepared, config, engine, layout, advance)
        rounds = math.ceil(len(batches) / engine.num_processes / ROUND)
        for each in _rounds(answering, rounds, stop, whole=done is not None):
            found.add(_over_ranks(each, engine))
            fresh = [*_from(found.answers, written)]
            if done is not None and fresh:
                done(written, fresh)
                written += len(fresh)
    predictions = [*_from(found.answers, 0)]
    means, scores = score(resolve(config.task.metrics), predictions, [list(record.answers) for record in records])
    return Evaluation({"loss": found.loss / max(found.tokens, 1), **means}, predictions, scores)


def _rounds(answering: Answering, rounds: int, stop: Callable[[], int | None], *, whole: bool) -> Iterator[Found]:
    """What this process finds in each round. All processes have the same number of rounds, some perhaps without rows;
    a signal ends the last one. `whole`: no row waits for the next round to fill a batch.
    """
    batches = iter(answering.prepared)
    for number in range(rounds):
        for _, (rows, records) in zip(range(ROUND), batches, strict=False):
            answering.add(rows, records)
            if stop() is not None:
                break
        else:
            if whole or number == rounds - 1:
                answering.finish()
        yield answering.taken(stop())


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
