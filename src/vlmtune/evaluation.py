"""Loss and metrics over a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmtune import display
from vlmtune.config import Config
from vlmtune.data.batch import padded
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
    model: Any, encoder: Encoder, records: Sequence[Record], config: Config, engine: Any, *, title: str
) -> Evaluation:
    """Answer all records and compare; each rank takes every n-th row."""
    from accelerate.utils import gather_object

    rank, ranks = engine.process_index, engine.num_processes
    own = [records[i] for i in range(rank, len(records), ranks)]
    batch_size = config.trainer.eval_batch_size
    with display.bar(title, 2 * len(own), show=engine.is_main_process) as advance:
        loss, tokens = loss_over(model, encoder, own, batch_size, engine, advance)
        answers = generate(
            model, encoder, own, config.generation, batch_size=batch_size, autocast=engine.autocast, advance=advance
        )
    if ranks > 1:
        gathered = gather_object([(rank, loss, tokens, answers)])
        loss, tokens = sum(g[1] for g in gathered), sum(g[2] for g in gathered)
        by_rank = [g[3] for g in sorted(gathered)]
        answers = [by_rank[i % ranks][i // ranks] for i in range(len(records))]
    references = [list(records[i].answers) for i in range(len(records))]
    means, scores = score(resolve(config.task.metrics), answers, references)
    return Evaluation({"loss": loss / max(tokens, 1), **means}, answers, scores)


@torch.no_grad()
def loss_over(
    model: Any, encoder: Encoder, records: Sequence[Record], batch_size: int, engine: Any, advance: Any
) -> tuple[float, int]:
    """Summed loss and count of supervised tokens."""
    was_training = model.training
    model.eval()
    loss, tokens = 0.0, 0
    for start in range(0, len(records), batch_size):
        batch = padded(encoder, records[start : start + batch_size])
        with engine.autocast():
            loss += float(summed_loss(model, batch.to(engine.device)))
        tokens += batch.supervised
        advance(batch.rows)
    model.train(was_training)
    return loss, tokens
