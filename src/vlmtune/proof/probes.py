"""Two ways of computing the same, compared on the user's own rows and model. Each probe returns one decision, and
changes nothing.
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
from vlmtune.models import rewrites
from vlmtune.models.features import Features, refusal
from vlmtune.models.parts import Parts
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import Pixels, pixels_mark

log = logging.getLogger("vlmtune")
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)
"""What a model raises where it can't take a form of its inputs."""


def choose_layout(
    model: Any, encoder: Encoder, pairs: list[list[Record]], trainer: TrainerConfig, engine: Any, *, evaluated: bool
) -> Layout:
    """Padded or shared batches, by `trainer.share_prefix`. `pairs`: rows that show the same images, by shape.

    `auto` compares loss and gradients of both on a few rows of the user's own, on their own model. Families whose
    attention is not causal over a 4-D mask (cross-attention, bidirectional image tokens) differ or refuse.
    Raises ConfigError where `on` is asked for and would change the loss.
    """
    if trainer.share_prefix == "off":
        return Layout(reason="trainer.share_prefix=off")
    if not pairs:
        return Layout(reason="no rows share a prompt up to an image")
    verdicts = [layouts_agree(model, encoder, rows, engine) for rows in pairs]
    evidence = next((evidence for fits, evidence in verdicts if not fits), verdicts[0][1])
    fits = session.all_ranks(all(fits for fits, _ in verdicts), engine)
    if not fits and trainer.share_prefix == "on":
        raise ConfigError(f"trainer.share_prefix=on: {evidence}; use auto or off")
    answers = fits and evaluated and all(answers_agree(model, encoder, rows, engine) for rows in pairs)
    return Layout(fits, fits and evaluated and session.all_ranks(answers, engine), evidence)


def answers_agree(model: Any, encoder: Encoder, records: list[Record], engine: Any) -> bool:
    """Whether this model, with a cache, writes the same tokens for records that share their image as for each alone.

    False where there are none.
    """
    if not records:
        return False
    options = {"batch_size": len(records), "autocast": engine.autocast}
    short = GenerationConfig(max_new_tokens=4)
    try:
        answers = [generate(model, encoder, records, short, share=share, **options) for share in (False, True)]
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        log.info("generation is not shared: this model refuses (%s)", str(error).splitlines()[0])
        return False
    return answers[0] == answers[1]


def layouts_agree(model: Any, encoder: Encoder, records: list[Record], engine: Any) -> tuple[bool, str]:
    """Whether both layouts of `records` give this model the same loss and gradients, and the evidence."""
    plain, branched = partial(padded, encoder, records), partial(shared, encoder, records)
    return _agree(model, engine, plain, branched, "the shared layout")


@dataclass(frozen=True)
class ImageCache:
    """Where a run keeps what images become, as found out at its start."""

    store: Pixels | None
    """None: images are computed each time."""
    sentence: str


def choose_cache(
    model: Any,
    parts: Parts,
    encoder: Encoder,
    sample: Sequence[Record],
    config: Config,
    engine: Any,
    *,
    seen_once: bool,
) -> ImageCache:
    """Keep image features by `data.cache_features`, or the processor's pixels where features can't be kept and a cache
    is asked for. `sample`: training rows; `seen_once`: whether the run needs each image only once.

    Raises ConfigError where it is asked for and this model or run can't.
    """
    wish = config.data.cache_features
    shown = [record for record in sample if record.images]
    if reason := _needs_no_cache(config.data, shown, engine, seen_once):
        return _uncached(wish, reason)
    refused = refusal(model, parts)
    if refused and wish == "auto":
        return _uncached(wish, refused)
    store: Pixels
    if refused:
        store = Pixels(pixels_mark(encoder.processor, config.data.fast_jpeg), config.data)
        fits, evidence = _same_inputs(partial(padded, encoder, shown), partial(padded, encoder.keeping(store), shown))
    else:
        store = Features(model, parts, encoder.processor, config.data, engine)
        plain, kept = partial(padded, encoder, shown), partial(padded, encoder.keeping(store), shown)
        fits, evidence = _agree(model, engine, plain, kept, "features in place of pixels")
    if not session.all_ranks(fits, engine):
        return _uncached(wish, evidence)
    what = f"not kept ({refused}), but pixels are," if refused else "kept"
    return ImageCache(store, f"features   {what} {'on disk' if wish == 'disk' else 'in memory'} ({evidence})")


def _needs_no_cache(data: DataConfig, shown: Sequence[Record], engine: Any, seen_once: bool) -> str | None:
    """Why nothing is kept of the images, whatever the model; None where something may be."""
    wish = data.cache_features
    if wish == "off":
        return "data.cache_features=off"
    if data.streaming:
        return "rows of a stream are seen once"
    if not shown:
        return "these rows have no images"
    if wish == "auto" and engine.device.type != "cpu":
        return "auto: only on a CPU"
    if wish == "auto" and seen_once:
        return "auto: each image is needed once"
    return None


def _uncached(wish: str, reason: str) -> ImageCache:
    if wish in ("memory", "disk"):
        raise ConfigError(f"data.cache_features={wish}: {reason}; use auto or off")
    return ImageCache(None, f"features   computed each time ({reason})")


def rewrites_agree(model: Any, encoder: Encoder, sample: Sequence[Record], engine: Any) -> bool:
    """Whether the fast forms of modules (`models.rewrites`) give this model the loss and gradients of the plain ones.

    True where it has none. The log says which are used.
    """
    if not rewrites.is_used(model):
        return True
    batch = partial(padded, encoder, sample)
    with rewrites.plain(model):
        plain = _passed(model, batch, engine)
    try:
        fits, evidence = _compared(plain, _passed(model, batch, engine), model, engine)
    except REFUSALS as error:
        fits, evidence = False, f"they fail on this model: {str(error).splitlines()[0]}"
    fits = session.all_ranks(fits, engine)
    log.info("rewrites   %s (%s)", "in use" if fits else "left out", evidence)
    return fits


def _same_inputs(plain: Callable[[], Batch], kept: Callable[[], Batch]) -> tuple[bool, str]:
    """Whether two forms of the same rows are bit-equal inputs of the model, and the evidence."""
    first = plain().inputs
    try:
        second = kept().inputs
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return False, f"pixels of single images can't be joined ({str(error).splitlines()[0]})"
    same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return same, "bit-equal to those made anew" if same else "pixels differ from those made anew"


def _agree(
    model: Any, engine: Any, plain: Callable[[], Batch], fast: Callable[[], Batch], name: str
) -> tuple[bool, str]:
    """Whether two forms of the same rows give the same loss and gradients, and the evidence as a sentence."""
    try:
        first, second = _passed(model, plain, engine), _passed(model, fast, engine)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return False, f"this model refuses {name} ({str(error).splitlines()[0]})"
    return _compared(first, second, model, engine)


Pass = tuple[float, torch.Tensor]
"""A summed loss, and gradients in one vector."""


def _passed(model: Any, batch: Callable[[], Batch], engine: Any) -> Pass:
    """One forward and backward pass in evaluation mode, so that dropout doesn't tell two of them apart."""
    was_training = model.training
    model.eval()
    try:
        return _loss_and_gradient(model, batch(), engine)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def _compared(first: Pass, second: Pass, model: Any, engine: Any) -> tuple[bool, str]:
    """Whether the second pass gave what the first did, but for rounding, and the evidence as a sentence."""
    halves = (torch.float16, torch.bfloat16)
    half = engine.mixed_precision != "no" or any(p.dtype in halves for p in model.parameters())
    allowed = 5e-2 if half else 1e-3
    loss_gap = abs(first[0] - second[0]) / max(abs(first[0]), 1e-6)
    gradient_gap = float((first[1] - second[1]).norm() / first[1].norm().clamp(min=1e-12))
    found = f"loss differs by {loss_gap:.1e}, gradients by {gradient_gap:.1e} (relative; allowed {allowed:.0e})"
    return loss_gap <= allowed and gradient_gap <= allowed, found


COMPARED = 20_000_000
"""Gradient entries that are compared at most: those of the smallest tensors, which all lie behind the attention."""


def _loss_and_gradient(model: Any, batch: Batch, engine: Any) -> Pass:
    """Summed loss, and gradients in one vector on the CPU."""
    model.zero_grad(set_to_none=True)
    with engine.autocast():
        loss = summed_loss(model, batch.to(engine.device))
    loss.backward()
    gradients = sorted((p.grad for p in model.parameters() if p.grad is not None), key=torch.Tensor.numel)
    sizes = itertools.accumulate(g.numel() for g in gradients)
    chosen = [g for g, size in zip(gradients, sizes, strict=True) if size <= COMPARED] or gradients[:1]
    return float(loss.detach()), torch.cat([g.flatten().float().cpu() for g in chosen])
