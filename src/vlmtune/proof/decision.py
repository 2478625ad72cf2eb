"""What a run decides once, at its start: the batch layout, the image cache, and the resulting steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vlmtune.batching.groups import groups_of
from vlmtune.batching.layout import Layout
from vlmtune.batching.order import Plan, plan
from vlmtune.config.schema import Config, TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import Records
from vlmtune.launch.engine import Engine
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import PixelStore
from vlmtune.proof.pairs import pairs
from vlmtune.proof.probes import choose_answers, choose_cache, choose_layout

log = logging.getLogger("vlmtune")
MOST_ROWS = 6
"""Rows of one shape on which the layouts are compared, at most."""


@dataclass(frozen=True)
class Decision:
    """The layout, cache and steps of a run."""

    layout: Layout
    cache: PixelStore | None
    """Where the model inputs of images are kept; None: they are computed each time."""
    plan: Plan
    rows: Sequence[Record]
    """Some rows of one micro-batch in this layout, for the checks that run the model."""


def decide(
    model: Any,
    parts: Parts,
    encoder: Encoder,
    records: Records,
    sample: Sequence[Record],
    config: Config,
    engine: Engine,
    *,
    evaluated: bool,
) -> Decision:
    """Compare the options on the run's own rows, and log what is chosen and why.

    Raises ConfigError if the config requires an option that would change the result.
    """
    trainer, streamed = config.trainer, records.streamed
    groups = groups_of(records, encoder)
    lengths = encoder.lengths(records) if trainer.batch_tokens and not streamed else []
    alike = partial(pairs, encoder, records, groups)
    layout = _layout(model, encoder, alike, lengths, trainer, engine, evaluated=evaluated)
    log.info(layout.sentence)
    steps = plan(
        trainer,
        groups,
        lengths,
        processes=engine.num_processes,
        streamed=streamed,
        # `on` also where no two fit into a micro-batch: a step takes the same rows, however it is cut
        by_group=layout.share or trainer.share_prefix == "on",
    )
    seen_once = not evaluated and steps.total_steps <= steps.order.steps_per_epoch
    # padded, the sample is such a micro-batch; shared, one has fewer tokens
    rows = [records[row] for row in steps.order.passes(0, 0)[0][:MOST_ROWS]] if layout.share else sample
    cache = choose_cache(model, parts, encoder, rows[:4], layout, config, engine, seen_once=seen_once)
    log.info(cache.sentence)
    return Decision(layout, cache.store, steps, rows)


def _layout(
    model: Any,
    encoder: Encoder,
    alike: Callable[..., list[list[Record]]],
    lengths: Sequence[tuple[int, int]],
    trainer: TrainerConfig,
    engine: Engine,
    *,
    evaluated: bool,
) -> Layout:
    """The layout of a run. `alike`: `pairs` of the run's rows; `lengths`: theirs, with `trainer.batch_tokens`."""
    most = MOST_ROWS if trainer.batch_tokens else min(MOST_ROWS, trainer.batch_size)
    trained = alike(most, lengths=lengths, most_tokens=trainer.batch_tokens)
    layout = choose_layout(model, encoder, trained, trainer, engine, evaluated=evaluated)
    if trained or not evaluated or trainer.share_prefix == "off":
        return layout
    asked = alike(min(MOST_ROWS, trainer.eval_batch_size))  # evaluation may hold more rows at a time
    return replace(layout, share_answers=choose_answers(model, encoder, asked, engine))
