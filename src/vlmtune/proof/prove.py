"""Checks before time is spent: each one raises, or returns one line for the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.memory import is_out_of_memory, noted
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import checks
from vlmtune.proof.attention import check_attention
from vlmtune.proof.decision import Decision
from vlmtune.proof.first_pass import check_gradients, check_longest, check_loss
from vlmtune.proof.rows import Checked

log = logging.getLogger("vlmtune")
CHECKS = "in a check before training"


def prove(
    model: Any, parts: Parts, encoder: Encoder, sample: Sequence[Record], rows: Checked, config: Config, engine: Engine
) -> None:
    """Check on real rows that the labels, inputs and loss are right.

    `sample`: rows that training begins with; `rows`: the result of checking all rows. Raises VlmtuneError.
    """
    shapes = [*sample, *rows.shapes]
    log.info(checks.parts_table(model, parts))
    log.info(rows.sentence)
    log.info(checks.check_labels(encoder, shapes))
    log.info(checks.check_inputs(encoder, shapes))
    log.info(checks.check_images(encoder, sample, config.model.image))
    with noted(CHECKS, model=model, useless=["trainer.eval_batch_size"]):
        if sentence := check_attention(model, encoder, sample, engine):
            log.info(sentence)
        log.info(check_loss(model, encoder, sample, engine))


def prove_passes(
    model: Any, parts: Parts, loader: Loader, decision: Decision, rows: Checked, config: Config, engine: Engine
) -> None:
    """Check on real rows, in the run's layout, that the gradients are right and that the longest row fits into memory.

    With `trainer.auto_micro_batch`, micro-batches are halved until it does, on all processes. Raises VlmtuneError.
    """
    keeps = {"keeps_gradients": not config.optimizer.step_in_backward}
    sample, may_halve = decision.rows, config.trainer.auto_micro_batch
    while True:
        try:
            with noted(CHECKS, model=model, useless=["trainer.eval_batch_size"]):
                gradients = check_gradients(model, parts, loader.encoder, sample, engine, decision.layout, **keeps)
                longest = check_longest(model, loader, rows.longest, engine, **keeps)
            fits = True
        except Exception as error:
            if not (may_halve and loader.order.most_rows > 1 and is_out_of_memory(error)):
                raise
            fits = False
        if session.all_ranks(fits, engine):
            break
        session.free_memory()
        loader.halve()
        sample = sample[: loader.order.most_rows]
        log.warning("memory     too short for that: halved to micro-batches of %d rows at most", loader.order.most_rows)
    log.info(gradients)
    log.info(longest)
