"""Loss and metrics over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmtune import display
from vlmtune.config import Config
from vlmtune.data.batch import Batch, padded
from vlmtune.data.encode import Encoder
from vlmtune.data.records import Record
from vlmtune.generate import generate
from vlmtune.loss import summed_loss
from vlmtune.metrics import resolve, score


@dataclass
class Evaluation:
    """What a model scored on some rows."""

    metrics: dict[str, float]
    """`loss` per supervised token and the task's metrics, means over the rows."""
    predictions: list[str]
    scores: list[dict[str, float]]
    """The task's metrics of each row."""


def evaluate(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    config: Config,
    engine: Any,
    *,
    title: str,
    make: Callable[[Encoder, Sequence[Record]], Batch] = padded,
) -> Evaluation:
    """Answer all records and compare; each rank takes a stretch of them. `make` lays out the batches for the loss."""
    from accelerate.utils import gather_object

    ranks = engine.num_processes
    stretch = math.ceil(len(records) / ranks)
    own = records[engine.process_index * stretch : (engine.process_index + 1) * stretch]
    size = config.trainer.eval_batch_size
    with display.bar(title, 2 * len(own), show=engine.is_main_process) as advance:
        loss, tokens = loss_over(model, encoder, own, size, engine, make, advance)
        answers = generate(
            model, encoder, own, config.generation, batch_size=size, autocast=engine.autocast, advance=advance
        )
    if ranks > 1:
        gathered = gather_object([(loss, tokens, answers)])  # in the order of the ranks
        loss, tokens = sum(g[0] for g in gathered), sum(g[1] for g in gathered)
        answers = [answer for g in gathered for answer in g[2]]
    means, scores = score(resolve(config.task.metrics), answers, [list(record.answers) for record in records])
    return Evaluation({"loss": loss / max(tokens, 1), **means}, answers, scores)


@torch.no_grad()
def loss_over(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    batch_size: int,
    engine: Any,
    make: Callable[[Encoder, Sequence[Record]], Batch],
    advance: Callable[[int], None],
) -> tuple[float, int]:
    """Summed loss and count of supervised tokens."""
    was_training = model.training
    model.eval()
    loss, tokens = 0.0, 0
    for start in range(0, len(records), batch_size):
        batch = make(encoder, records[start : start + batch_size])
        with engine.autocast():
            loss += float(summed_loss(model, batch.to(engine.device)))
        tokens += batch.supervised
        advance(batch.rows)
    model.train(was_training)
    return loss, tokens
