"""The whole architecture on one page: `build` makes everything that a run needs, in order, and `fit` trains it.

Rows are read before this module is imported, because it imports torch: a mistake in a table is reported at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from vlmtune import planning, proof
from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config
from vlmtune.data.splits import Split
from vlmtune.launch import session
from vlmtune.models import adapters, gradient_checkpointing, load, rewrites, sharding
from vlmtune.models.parts import find_parts
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.record import environment
from vlmtune.training import (
    Attempts,
    Best,
    Finish,
    Journal,
    Saving,
    Schedule,
    Scoring,
    Stopping,
    build_optimizer,
    loop,
    setup,
)
from vlmtune.training.agreement import agree


def build(config: Config, splits: dict[str, Split], folder: Path | None) -> setup.Setup:
    """Everything that a run needs, checked on its own rows. `folder`: on the first process. Raises VlmtuneError."""
    # processes and number types
    engine = session.engine(config)
    folder = agree(folder, config, splits, engine)
    dtypes = session.dtypes(config, engine)

    # the model, and which of its weights train
    adapters.check(config)
    load.make_fresh(config.model, folder / "base", config.trainer.seed, engine)
    environment.PEAK.opens_model()
    model, processor = load.load(config.model, sharding.storage(config, engine), device=engine.device, **dtypes)
    parts = find_parts(model)
    multiple = rewrites.length_multiple(engine.device, dtypes["compute_dtype"])
    encoder = Encoder.of(processor, config, pad_to_multiple_of=multiple)
    rows = proof.check_rows(encoder, splits, config, proof.limits_of(model))
    model = adapters.adapt(model, config, parts)
    gradient_checkpointing.prepare(model, config.trainer)

    # checks before time is spent, and the decisions that follow from them
    records = splits["train"].records
    sample = proof.sample_rows(encoder, records, config.trainer, most=8)
    if not proof.rewrites_agree(model, encoder, sample, engine):
        rewrites.switch_off(model)
    proof.prove(model, parts, encoder, sample, rows, config, engine)
    decision = proof.decide(model, parts, encoder, records, sample, config, engine, evaluated=len(splits) > 1)
    encoder = encoder.keeping(decision.cache)
    loader = Loader(encoder, records, decision.plan, decision.layout, config.trainer, engine, model)
    proof.prove_passes(model, parts, loader, decision, rows, config, engine)
    environment.PEAK.predicted = planning.predicted(config, model, loader, rows.longest, engine)

    # shares of the model, optimizer and schedule
    sharding.shard(model, config.sharding, encoder, records, engine)
    optimizer = build_optimizer(model, parts, config.trainer, config.optimizer, engine)
    scheduler = Schedule(optimizer, config.trainer, loader.total_steps)
    adapters.set_total_steps(model, config, loader.total_steps)
    prepared, optimizer = setup.ready(model, optimizer, config.trainer, engine)
    made = (model, prepared, parts, processor, encoder, loader, optimizer, scheduler)
    return setup.Setup(config, folder, engine, splits, *made)


def fit(run: setup.Setup) -> dict[str, Any]:
    """Train the run that `build` made and write its result to the run folder. Returns the content of result.json."""
    stopping = Stopping(run)
    with stopping.watching(), Saving(run, stopping) as saving, Journal(run, saving.progress) as journal:
        scoring = Scoring(run, journal, stopping)
        best = Best(scoring, saving)
        scoring.measure_baseline()
        hooks = loop.Hooks(
            before_step=partial(session.seed_step, run.config.trainer.seed, run.engine),
            after_step=(journal.after_step, best.after_step, saving.after_step),
            before_zero_grad=partial(adapters.after_step, run.model),
            penalty=partial(adapters.penalty, run.model),
            stop=lambda: stopping.asked() or best.exhausted,
        )
        with journal.training():
            if not best.exhausted:
                Attempts(run, saving, hooks).train(summed_loss)
        return Finish(run, journal, best)()
