"""Checks before time is spent: each one raises, or returns one line for the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.launch.engine import Engine
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import checks, first_pass
from vlmtune.proof.attention import check_attention
from vlmtune.proof.decision import Decision
from vlmtune.proof.rows import Checked

log = logging.getLogger("vlmtune")


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
    if sentence := check_attention(model, encoder, sample, engine):
        log.info(sentence)
    log.info(first_pass.check_loss(model, encoder, sample, engine))


def prove_passes(
    model: Any, parts: Parts, loader: Loader, decision: Decision, rows: Checked, config: Config, engine: Engine
) -> None:
    """Check on real rows, in the run's layout, that the gradients are right and that the longest row fits into memory.

    Raises VlmtuneError.
    """
    keeps = {"keeps_gradients": not config.optimizer.step_in_backward}
    log.info(first_pass.check_gradients(model, parts, loader.encoder, decision.rows, engine, decision.layout, **keeps))
    log.info(first_pass.check_longest(model, loader, rows.longest, engine, **keeps))
