"""The page that is the architecture: everything a run needs is built here, in order, and handed to a plain loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlmtune.config.schema import Config
from vlmtune.data import table
from vlmtune.errors import ConfigError, memory_advice

log = logging.getLogger("vlmtune")


@memory_advice()
def train(config: Config, folder: Path | None) -> dict[str, Any]:
    """One run: from rows to a fine-tuned model in `folder` (None on ranks other than the first, which write nothing).

    Returns what result.json holds. Raises VlmtuneError for what the user can solve.
    """
    # rows -> records, audited before anything heavy is imported
    splits = table.load(config.data, config.task, config.trainer.seed)

    if config.trainer.best_metric and "validation" not in splits:
        raise ConfigError("trainer.best_metric: needs rows to evaluate; set data.validation(_fraction)")
    log.info("fine-tuning %s for %s", config.model.name, config.task.name)

    from vlmtune.batching.loader import Batches
    from vlmtune.launch import session
    from vlmtune.models import adapters, load, rewrites
    from vlmtune.models.parts import find_parts
    from vlmtune.objectives.next_token import summed_loss
    from vlmtune.prompt.encode import Encoder
    from vlmtune.proof import first_pass, preflight
    from vlmtune.proof import rows as row_checks
    from vlmtune.training.loop import fit
    from vlmtune.training.optim import build_optimizer, build_scheduler
    from vlmtune.training.recorder import Recorder

    # processes and number types
    engine = session.engine(config)
    folder = session.agree_on_folder(folder, engine)
    dtypes = session.dtypes(config, engine)

    # model and what trains of it
    adapters.check(config)
    if config.model.fresh:
        load.make_fresh(config.model, folder / "base", config.trainer.seed, engine)
    model, processor = load.load(config.model, config.quantization, device=engine.device, **dtypes)
    parts = find_parts(model)
    encoder = Encoder(
        processor,
        system_prompt=config.model.system_prompt,
        max_image_pixels=config.data.max_image_pixels,
        supervise=config.data.supervise,
        fast_jpeg=config.data.fast_jpeg,
    )
    encoder.pad_to_multiple_of = rewrites.length_multiple(engine.device, dtypes["compute_dtype"])
    rows = row_checks.check_rows(encoder, splits, config, row_checks.limits_of(model))
    batches = Batches(encoder, splits["train"].records, config.trainer, engine)
    model = adapters.adapt(model, config, parts)
    session.prepare_checkpointing(model, config.trainer)
    optimizer = build_optimizer(model, parts, config.trainer, config.optimizer)

    # proof before time is spent
    sample = batches.sample(8)
    log.info(preflight.parts_table(model, parts))
    log.info(rows.sentence)
    log.info(preflight.check_labels(encoder, [*sample, *rows.shapes]))
    log.info(preflight.check_inputs(encoder, [*sample, *rows.shapes]))
    log.info(preflight.check_images(encoder, sample, config.model.image))
    log.info(first_pass.check_loss(model, encoder, sample, engine))
    log.info(first_pass.check_gradients(model, parts, encoder, sample, engine))
    evaluated = bool(splits.keys() & {"validation", "test"})
    log.info(preflight.choose_layout(model, batches, engine, evaluated))
    log.info(preflight.choose_features(model, parts, batches, config, engine, evaluated))
    adapters.set_total_steps(model, config, batches.total_steps)
    log.info(first_pass.check_longest(model, batches, rows.longest, engine))
    if config.preflight == "only":
        return {"status": "preflight", "steps": 0}

    # the run, whose steps are counted now that the layout is known
    scheduler = build_scheduler(optimizer, config.trainer, batches.total_steps)
    prepared, optimizer = engine.prepare(model, optimizer)
    recorder = Recorder(config, folder, engine, model, encoder, splits, batches)
    with recorder.recording():
        progress = recorder.open(optimizer, scheduler, processor)
        recorder.measure_baseline()
        with recorder.training():
            fit(
                prepared,
                [] if recorder.stopped_early else batches.steps(progress.step),
                optimizer,
                scheduler,
                engine,
                summed_loss,
                progress,
                max_grad_norm=config.trainer.max_grad_norm,
                skip_nonfinite=config.trainer.nonfinite == "skip",
                hooks=recorder.hooks(),
            )
        return recorder.finish()
