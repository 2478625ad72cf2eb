"""Merge adapters into their base model: everything in order, from the runs to a folder that any program opens.

merge
├── opening.open_all        the base, unquantized, with the adapters of the runs
├── choose                  several adapters become one; of several methods the one that scores best
├── combining.merge_into_base, model_folder.write_model
├── proof.difference        the written folder, opened again, against base and adapter
└── scoring, card, hub      its scores, its model card, its upload
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune import display, durable
from vlmtune.config.schema import Config
from vlmtune.errors import ConfigError
from vlmtune.export import card, gguf, hub, opening, proof, scoring
from vlmtune.export.merged import Merged
from vlmtune.export.options import DENSITY, SPARSE, Options
from vlmtune.export.rows import Rows, rows_of
from vlmtune.export.sources import Source, read_all
from vlmtune.launch import session, signals
from vlmtune.launch.engine import Engine
from vlmtune.memory import TRAINING, memory_advice
from vlmtune.metrics import lower_is_better
from vlmtune.models.combining import Way, combine, merge_into_base
from vlmtune.prompt.encode import Encoder
from vlmtune.training.model_folder import write_model

log = logging.getLogger("vlmtune")
SHARD = "5GB"
"""Largest file of weights."""


@dataclass
class Before:
    """What is kept of base and adapters when they are gone from memory."""

    adapted: list[Tensor]
    base: list[Tensor]
    way: Way | None
    scores: list[scoring.Scored]


def merge(options: Options, config: Config, *, scored: bool, command: Sequence[str] = ()) -> Merged:
    """Write the merged model of the runs in `options` to its folder, proven on a few rows.

    `config`: of the first run, with the command's keys. `scored`: whether to score on `data.test`, too. `command`: the
    words that asked for it, for the model card.
    Raises VlmtuneError where the runs don't fit together or the merged model is not the same; nothing is left then.
    """
    sources, target = read_all(options), new_folder(options.output)
    hub.check(options)
    plain = opening.unquantized(config, sources[0].run)
    with signals.ending_at_once(), display.logging_to(None), memory_advice(TRAINING):
        rows = rows_of(config, scored=scored)
        scores = as_trained(sources, config, rows)
        engine = session.engine(plain, trains=False)
        dtype = opening.dtype_of(options.dtype, plain.model)
        with durable.whole(target) as partial:
            before = write(options, sources, plain, dtype, engine, rows, partial)
            found, last = prove(before, plain, dtype, engine, rows, partial)
        made = (options.shares, config, plain, dtype, before.way, found, scores + before.scores + last)
        merged = Merged(target, sources, *made)
        if rows.scored is not None:
            merged.rows, merged.fingerprint = len(rows.scored), rows.scored.fingerprint()
        card.write(merged, [*command])  # after the checksums, so that its owner may edit it
        if options.gguf is not None:
            gguf.convert(target, options.gguf, dtype)
        merged.address = hub.push(target, options)
    return merged


def new_folder(output: str | None) -> Path:
    """The folder to write. Raises ConfigError where it is there already, or can't be made."""
    from vlmtune.config.paths import check_writable

    target = Path(str(output)).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"output={output}: is there already; name a new folder, or delete it")
    check_writable(target)
    return target


def as_trained(sources: Sequence[Source], config: Config, rows: Rows) -> list[scoring.Scored]:
    """The scores of a single run as it was trained, over a quantized base if it had one."""
    from vlmtune.predict.predictor import Predictor

    if rows.scored is None or len(sources) > 1:
        return []
    predictor = Predictor(sources[0].run, config)
    name = f"as trained, over {config.quantization.method}" if config.is_quantized else "as trained"
    with predictor.at_work():
        return [scoring.score(name, predictor.model, predictor.encoder, rows.scored, config, predictor.engine)]


def write(
    options: Options,
    sources: Sequence[Source],
    config: Config,
    dtype: torch.dtype,
    engine: Engine,
    rows: Rows,
    folder: Path,
) -> Before:
    """Write the merged model to `folder`. No model is in memory afterwards."""
    from vlmtune.training.model_folder import whole_state

    opened = opening.open_all(config, sources, dtype, engine)
    encoder = Encoder.of(opened.processor, config)
    way, scores = choose(options, sources, opened, encoder, config, engine, rows)
    adapted = proof.logits_of(opened.model, encoder, rows.records)
    with opened.model.disable_adapter():
        base = proof.logits_of(opened.model, encoder, rows.records)
    plain = merge_into_base(opened.model, opened.types)
    del opened.model
    plain.requires_grad_(True)  # all weights are compared with the files
    write_model(plain, opened.processor, folder, config.model, whole_state(plain), max_shard_size=SHARD)
    return Before(adapted, base, way, scores)


def choose(
    options: Options,
    sources: Sequence[Source],
    opened: opening.Opened,
    encoder: Encoder,
    config: Config,
    engine: Engine,
    rows: Rows,
) -> tuple[Way | None, list[scoring.Scored]]:
    """Make one active adapter of several, by the method that scores best on `data.test` where there is a choice.

    Returns that method, and the scores of each adapter alone and of all methods.
    """
    if len(sources) == 1:
        return None, []
    found: list[tuple[scoring.Scored, Way]] = []
    alone: list[scoring.Scored] = []
    tried = [way_of(method, options) for method in options.tried]
    if rows.scored is not None and options.methods:
        for name, source in zip(opened.names, sources, strict=True):
            opened.model.set_adapter(name)
            alone.append(scoring.score(f"{source.run.name} alone", opened.model, encoder, rows.scored, config, engine))
        for way in tried:
            combine(opened.model, opened.names, options.shares, way, way.method)
            opened.model.requires_grad_(False)
            found.append((scoring.score(way.method, opened.model, encoder, rows.scored, config, engine), way))
            opened.model.set_adapter(opened.names[0])
            opened.model.delete_adapter(way.method)
        metric = config.task.metrics[0]
        best = min if lower_is_better(metric) else max
        tried = [best(found, key=lambda each: each[0].metrics[metric])[1]]
        log.info("%s has the best %s and is written", tried[0].method, metric)
    combine(opened.model, opened.names, options.shares, tried[0], "combined")
    opened.model.requires_grad_(False)
    return tried[0], [*alone, *(score for score, _ in found)]


def way_of(method: str, options: Options) -> Way:
    """PEFT's arguments for a method."""
    density = (options.density or DENSITY) if method in SPARSE else None
    return Way(method, density, options.majority_sign_method, options.seed)


def prove(
    before: Before, config: Config, dtype: torch.dtype, engine: Engine, rows: Rows, folder: Path
) -> tuple[proof.Difference, list[scoring.Scored]]:
    """Open what was written, compare it with what it was made of, and score it where rows are given for that."""
    model, processor = opening.open_model(config, dtype, engine, folder)
    encoder = Encoder.of(processor, config)
    logits: Any = proof.logits_of(model, encoder, rows.records)
    found = proof.difference(logits, before.adapted, before.base, dtype, rows.source)
    log.info("%s", found.sentence)
    if found.merged > found.learned / 2:
        log.warning(
            "rounding to %s changes the logits by %.2g, and the adapter by %.2g: keep more of what was learned with "
            "dtype=fp32",
            *(str(dtype).removeprefix("torch."), found.merged, found.learned),
        )
    scores = []
    if rows.scored is not None:
        scores = [scoring.score("merged", model, encoder, rows.scored, config, engine)]
    return found, scores
