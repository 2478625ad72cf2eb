"""Loss and metrics over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmtune import display
from vlmtune.batching.layout import PLAIN, Batch, Layout, padded, shared
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.evaluation.drafts import Draft
from vlmtune.evaluation.generate import generate
from vlmtune.launch.engine import Engine
from vlmtune.launch.signals import EvaluationStopped
from vlmtune.metrics import resolve, score
from vlmtune.objectives.next_token import supervised_logits
from vlmtune.prompt.encode import Encoder

PIECE_BATCHES = 16
"""Number of batches whose answers are passed to `done` together, so that rows to generate still fill a batch."""


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
    """Answer and score all records; each rank takes a contiguous part.

    `stop`: called after each batch, returns the number of a signal that asks to stop, or None; every rank then raises
    `signals.EvaluationStopped`.
    `done`: called with the first row's number and the answers of a few batches, in order; with several processes once
    at the end, with all answers.
    """
    own, alone = _dealt(records, engine), engine.num_processes == 1
    result: Answered | int
    try:
        with display.bar(title, 2 * len(own), show=engine.is_main_process) as shown:

            def advance(rows: int) -> None:
                shown(rows)
                if number := stop():
                    raise EvaluationStopped(number)

            def answer(rows: Sequence[Record]) -> Answered:
                return _answer(model, encoder, rows, config, engine, layout, advance)

            result = _in_pieces(answer, own, config.trainer.eval_batch_size, done if alone else None)
    except EvaluationStopped as ended:
        result = ended.number
    loss, tokens, predictions = _over_ranks(result, engine)
    if done is not None and not alone:
        done(0, predictions)
    means, scores = score(resolve(config.task.metrics), predictions, [list(record.answers) for record in records])
    return Evaluation({"loss": loss / max(tokens, 1), **means}, predictions, scores)


def _dealt(records: Sequence[Record], engine: Engine) -> Sequence[Record]:
    """This rank's part of the records."""
    count = math.ceil(len(records) / engine.num_processes)
    return records[engine.process_index * count : (engine.process_index + 1) * count]


Answered = tuple[float, int, list[str]]
"""Summed loss, number of supervised tokens, and the answers, of some rows."""


def _over_ranks(own: Answered | int, engine: Engine) -> Answered:
    """The results of all ranks together. Raises `EvaluationStopped` if one of them has the number of a signal instead:
    it may reach only some ranks, and all must stop.
    """
    from accelerate.utils import gather_object

    found: list[Any] = [own] if engine.num_processes == 1 else gather_object([own])  # in rank order
    for number in found:
        if isinstance(number, int):
            raise EvaluationStopped(number)
    return sum(one[0] for one in found), sum(one[1] for one in found), [text for one in found for text in one[2]]


def _in_pieces(
    answer: Callable[[Sequence[Record]], Answered],
    own: Sequence[Record],
    size: int,
    done: Callable[[int, list[str]], None] | None,
) -> Answered:
    """The result of `answer` for all rows; piece by piece if there is a `done` to pass the answers to."""
    if done is None:
        return answer(own)
    loss, tokens = 0.0, 0
    texts: list[str] = []
    for start in range(0, len(own), PIECE_BATCHES * size):
        found = answer(own[start : start + PIECE_BATCHES * size])
        done(start, found[2])
        loss, tokens, texts = loss + found[0], tokens + found[1], texts + found[2]
    return loss, tokens, texts


def _answer(
    model: Any,
    encoder: Encoder,
    own: Sequence[Record],
    config: Config,
    engine: Engine,
    layout: Layout,
    advance: Callable[[int], None],
) -> Answered:
    """Evaluate some rows."""
    size = config.trainer.eval_batch_size
    make = shared if layout.share else padded
    draft = Draft(model, encoder, config.generation)
    loss, tokens, drafted = loss_and_drafts(model, encoder, own, size, engine, make, draft, advance)
    open_rows = [row for row, answer in enumerate(drafted) if answer is None]
    advance(len(own) - len(open_rows))
    rest = iter(
        generate(
            model,
            encoder,
            [own[row] for row in open_rows],
            config.generation,
            batch_size=size,
            autocast=engine.autocast,
            share=layout.share_answers,
            advance=advance,
        )
    )
    return loss, tokens, [next(rest) if answer is None else answer for answer in drafted]


PIECE = 256
"""Number of tokens whose logits are held in float32 at once."""


@torch.no_grad()
def loss_and_drafts(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    batch_size: int,
    engine: Engine,
    make: Callable[[Encoder, Sequence[Record]], Batch],
    draft: Draft,
    advance: Callable[[int], None],
) -> tuple[float, int, list[str | None]]:
    """Summed loss, number of supervised tokens, and the answers that this pass already reveals."""
    was_training = model.training
    model.eval()
    loss, tokens = 0.0, 0
    answers: list[str | None] = []
    for start in range(0, len(records), batch_size):
        rows = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        batch = make(encoder, rows).to(engine.device)
        with engine.autocast():
            logits, targets = supervised_logits(model, batch)
        likely: list[int] = []
        for part, wanted in zip(logits.split(PIECE), targets.split(PIECE), strict=True):
            values = part.float()
            loss += float(F.cross_entropy(values, wanted, reduction="sum"))
            values[:, draft.never] = -math.inf
            likely += values.argmax(-1).tolist()
        tokens += len(likely)
        answers += draft.answers(rows, batch, likely)
        advance(batch.rows)
    model.train(was_training)
    return loss, tokens, answers
