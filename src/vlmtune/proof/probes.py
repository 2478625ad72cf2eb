"""Two ways to compute the same result, compared on the user's own rows and model. Each probe returns one decision and
has no side effects.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlmtune.batching.layout import Batch, Layout, padded, shared
from vlmtune.config.schema import Config, DataConfig, GenerationConfig, TrainerConfig
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.models import rewrites
from vlmtune.models.features import FeatureStore, refusal
from vlmtune.models.parts import Parts
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import PixelStore, pixels_mark
from vlmtune.proof.first_pass import REFUSALS, computes_in_halves

log = logging.getLogger("vlmtune")


def choose_layout(
    model: Any, encoder: Encoder, pairs: list[list[Record]], trainer: TrainerConfig, engine: Engine, *, evaluated: bool
) -> Layout:
    """Padded or shared batches, by `trainer.share_prefix`. `pairs`: rows that show the same images, by shape.

    `auto` compares loss and gradients of both layouts on a few of the user's own rows, with their own model. Families
    whose attention is not causal under a 4-D mask (cross-attention, bidirectional image tokens) differ or raise.
    Raises ConfigError if `on` is set and would change the loss.
    """
    if trainer.share_prefix == "off":
        return Layout(reason="trainer.share_prefix=off")
    if not pairs:
        return Layout(reason="no rows are known to share a prompt up to an image")
    verdicts = [layouts_agree(model, encoder, rows, engine) for rows in pairs]
    evidence = next((evidence for fits, evidence in verdicts if not fits), verdicts[0][1])
    fits = session.all_ranks(all(fits for fits, _ in verdicts), engine)
    if not fits and trainer.share_prefix == "on":
        raise ConfigError(f"trainer.share_prefix=on: {evidence}; use auto or off")
    answers = fits and evaluated and all(answers_agree(model, encoder, rows, engine) for rows in pairs)
    return Layout(fits, fits and evaluated and session.all_ranks(answers, engine), evidence)


def answers_agree(model: Any, encoder: Encoder, records: list[Record], engine: Engine) -> bool:
    """Whether this model generates the same tokens for records that share their image as for each record alone.

    False if there are no records.
    """
    if not records:
        return False
    options: dict[str, Any] = {"batch_size": len(records), "autocast": engine.autocast}
    short = GenerationConfig(max_new_tokens=4)
    try:
        answers = [generate(model, encoder, records, short, share=share, **options) for share in (False, True)]
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        log.info("generation does not share images: this model does not support it (%s)", str(error).splitlines()[0])
        return False
    return answers[0] == answers[1]


def layouts_agree(model: Any, encoder: Encoder, records: list[Record], engine: Engine) -> tuple[bool, str]:
    """Whether loss and gradients are the same with both layouts of `records`, and the measured differences."""
    plain, branched = partial(padded, encoder, records), partial(shared, encoder, records)
    return _agree(model, engine, plain, branched, "the shared layout")


@dataclass(frozen=True)
class ImageCache:
    """Where a run keeps the model inputs of images, chosen at its start."""

    store: PixelStore | None
    """None: they are computed each time."""
    sentence: str


def choose_cache(
    model: Any,
    parts: Parts,
    encoder: Encoder,
    sample: Sequence[Record],
    config: Config,
    engine: Engine,
    *,
    seen_once: bool,
) -> ImageCache:
    """Cache image features by `data.cache_features`, or the processor's pixels if features can't be cached but a cache
    is required. `sample`: training rows; `seen_once`: whether the run needs each image only once.

    Raises ConfigError if a cache is required and this model or run can't have one.
    """
    setting = config.data.cache_features
    shown = [record for record in sample if record.images]
    if reason := _needs_no_cache(config.data, shown, engine, seen_once):
        return _uncached(setting, reason)
    refused = refusal(model, parts)
    if refused and setting == "auto":
        return _uncached(setting, refused)
    store: PixelStore
    if refused:
        store = PixelStore(pixels_mark(encoder.processor, config.data.fast_jpeg), config.data)
        fits, evidence = _same_inputs(partial(padded, encoder, shown), partial(padded, encoder.keeping(store), shown))
    else:
        store = FeatureStore(model, parts, encoder.processor, config.data, engine)
        plain, kept = partial(padded, encoder, shown), partial(padded, encoder.keeping(store), shown)
        fits, evidence = _agree(model, engine, plain, kept, "features in place of pixels")
    if not session.all_ranks(fits, engine):
        return _uncached(setting, evidence)
    what = f"not cached ({refused}), but pixels are," if refused else "cached"
    return ImageCache(store, f"features   {what} {'on disk' if setting == 'disk' else 'in memory'} ({evidence})")


def _needs_no_cache(data: DataConfig, shown: Sequence[Record], engine: Engine, seen_once: bool) -> str | None:
    """Why no model needs a cache here; None if a cache may help."""
    setting = data.cache_features
    if setting == "off":
        return "data.cache_features=off"
    if data.streaming:
        return "rows of a stream are seen once"
    if not shown:
        return "these rows have no images"
    if setting == "auto" and engine.device.type != "cpu":
        return "auto: only on a CPU"
    if setting == "auto" and seen_once:
        return "auto: each image is needed once"
    return None


def _uncached(setting: str, reason: str) -> ImageCache:
    if setting in ("memory", "disk"):
        raise ConfigError(f"data.cache_features={setting}: {reason}; use auto or off")
    return ImageCache(None, f"features   computed each time ({reason})")


def rewrites_agree(model: Any, encoder: Encoder, sample: Sequence[Record], engine: Engine) -> bool:
    """Whether loss and gradients are the same with the fast forms of modules (`models.rewrites`) as without.

    True if the model has none. The result is logged.
    """
    if not rewrites.is_used(model):
        return True
    batch = partial(padded, encoder, sample)
    try:
        with rewrites.plain(model):
            plain = _passed(model, batch, engine)
    except REFUSALS:  # so it isn't the rewrites: the first pass of `prove` says what it is
        return True
    try:
        fits, evidence = _compared(plain, _passed(model, batch, engine), model, engine)
    except REFUSALS as error:
        fits, evidence = False, f"they fail with this model: {str(error).splitlines()[0]}"
    fits = session.all_ranks(fits, engine)
    log.info("rewrites   %s (%s)", "in use" if fits else "not used", evidence)
    return fits


def _same_inputs(plain: Callable[[], Batch], kept: Callable[[], Batch]) -> tuple[bool, str]:
    """Whether two forms of the same rows give bit-equal model inputs, and the evidence."""
    first = plain().inputs
    try:
        second = kept().inputs
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return False, f"pixels of single images can't be combined ({str(error).splitlines()[0]})"
    same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return same, "bit-equal to freshly computed ones" if same else "cached pixels differ from freshly computed ones"


def _agree(
    model: Any, engine: Engine, plain: Callable[[], Batch], fast: Callable[[], Batch], name: str
) -> tuple[bool, str]:
    """Whether two forms of the same rows give the same loss and gradients, and the measured differences."""
    try:
        first, second = _passed(model, plain, engine), _passed(model, fast, engine)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return False, f"this model does not support {name} ({str(error).splitlines()[0]})"
    return _compared(first, second, model, engine)


Pass = tuple[float, torch.Tensor]
"""A summed loss, and the gradients as one vector."""


def _passed(model: Any, batch: Callable[[], Batch], engine: Engine) -> Pass:
    """One forward and backward pass in evaluation mode, so that dropout causes no differences."""
    was_training = model.training
    model.eval()
    try:
        return _loss_and_gradient(model, batch(), engine)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def _compared(first: Pass, second: Pass, model: Any, engine: Engine) -> tuple[bool, str]:
    """Whether both passes gave the same result up to rounding, and the measured differences."""
    allowed = 5e-2 if computes_in_halves(model, engine) else 1e-3
    loss_gap = abs(first[0] - second[0]) / max(abs(first[0]), 1e-6)
    gradient_gap = float((first[1] - second[1]).norm() / first[1].norm().clamp(min=1e-12))
    found = f"loss differs by {loss_gap:.1e}, gradients by {gradient_gap:.1e} (relative; allowed {allowed:.0e})"
    return loss_gap <= allowed and gradient_gap <= allowed, found


COMPARED = 20_000_000
"""The most gradient entries to compare: those of the smallest tensors, which all depend on the attention."""


def _loss_and_gradient(model: Any, batch: Batch, engine: Engine) -> Pass:
    """Summed loss, and the gradients as one vector on the CPU."""
    model.zero_grad(set_to_none=True)
    with engine.autocast():
        loss = summed_loss(model, batch.to(engine.device))
    loss.backward()
    gradients = sorted((p.grad for p in model.parameters() if p.grad is not None), key=torch.Tensor.numel)
    sizes = itertools.accumulate(g.numel() for g in gradients)
    chosen = [g for g, size in zip(gradients, sizes, strict=True) if size <= COMPARED] or gradients[:1]
    return float(loss.detach()), torch.cat([g.flatten().float().cpu() for g in chosen])
