"""Two ways to compute the same result, compared on the user's own rows and model. Each probe returns one decision and
has no side effects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlmtune.batching.layout import Batch, Layout, lay_out, padded, shared
from vlmtune.config.schema import Config, DataConfig, GenerationConfig, TrainerConfig
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.models import rewrites, sharding
from vlmtune.models.features import FeatureStore, refusal
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import PixelStore, pixels_mark
from vlmtune.proof.comparison import Comparison, Verdict, agreed, attempted, same_result

log = logging.getLogger("vlmtune")


def choose_layout(
    model: Any, encoder: Encoder, pairs: list[list[Record]], trainer: TrainerConfig, engine: Engine, *, evaluated: bool
) -> Layout:
    """Padded or shared batches, by `trainer.share_prefix`. `pairs`: rows that show the same images, by shape, as many
    as a micro-batch may hold.

    `auto` compares loss and gradients of both layouts on a few of the user's own rows, with their own model. Families
    whose attention is not causal under a 4-D mask (cross-attention, bidirectional image tokens) differ or raise.
    Raises ConfigError if `on` is set and would change the loss.
    """
    if trainer.share_prefix == "off":
        return Layout(reason="trainer.share_prefix=off")
    if not pairs:
        return Layout(reason=_why_no_pairs(trainer))
    verdicts = [layouts_agree(model, encoder, rows, engine) for rows in pairs]
    fits, evidence = agreed(next((found for found in verdicts if not found[0]), verdicts[0]), engine)
    if not fits and trainer.share_prefix == "on":
        raise ConfigError(f"trainer.share_prefix=on: {evidence}; use auto or off")
    return Layout(fits, fits and evaluated and choose_answers(model, encoder, pairs, engine), evidence)


def choose_answers(model: Any, encoder: Encoder, pairs: list[list[Record]], engine: Engine) -> bool:
    """Whether generation in evaluation may share images too. `pairs`: as in `choose_layout`."""
    agree = bool(pairs) and all(answers_agree(model, encoder, rows, engine) for rows in pairs)
    return session.all_ranks(agree, engine)


def _why_no_pairs(trainer: TrainerConfig) -> str:
    if trainer.batch_tokens is not None:
        return f"no two rows are known to share a prompt up to an image and to fit into {trainer.batch_tokens} tokens"
    if trainer.batch_size == 1:
        return "trainer.batch_size=1: no two rows are computed together"
    return "no rows are known to share a prompt up to an image"


def answers_agree(model: Any, encoder: Encoder, records: list[Record], engine: Engine) -> bool:
    """Whether this model generates the same tokens for records that share their image as for each record alone.

    False if there are no records.
    """
    if not records:
        return False
    options: dict[str, Any] = {"batch_size": len(records), "autocast": engine.autocast}
    short = GenerationConfig(max_new_tokens=4)

    def compare() -> Verdict:
        answers = [generate(model, encoder, records, short, share=share, **options) for share in (False, True)]
        return answers[0] == answers[1], "the answers differ"

    fits, reason = attempted(compare, "several answers over one image")
    if not fits:
        log.info("generation does not share images: %s", reason)
    return fits


def layouts_agree(model: Any, encoder: Encoder, records: list[Record], engine: Engine) -> Verdict:
    """Whether loss and gradients are the same with both layouts of `records`, and the measured differences.

    Padded, the image is there once for each row: so many rows at a time as have no more tokens than the shared batch.
    """

    def compare() -> Verdict:
        together = shared(encoder, records)
        longest = max(image + text for image, text in encoder.lengths(records))
        rows = max(together.padded_tokens // longest, 1)
        pieces = [partial(padded, encoder, records[n : n + rows]) for n in range(0, len(records), rows)]
        return same_result(model, engine, pieces, [lambda: together])

    return attempted(compare, "the shared layout")


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
    rows: Sequence[Record],
    layout: Layout,
    config: Config,
    engine: Engine,
    *,
    seen_once: bool,
) -> ImageCache:
    """Cache image features by `data.cache_features`, or the processor's pixels if features can't be cached but a cache
    is required. `rows`: of a micro-batch in the run's layout; `seen_once`: whether the run needs each image only once.

    Raises ConfigError if a cache is required and this model or run can't have one.
    """
    setting = config.data.cache_features
    shown = [record for record in rows if record.images]
    if reason := _needs_no_cache(config.data, shown, engine, seen_once):
        return _uncached(setting, reason)
    refused = refusal(model, parts) or sharding.refusal(config.sharding, engine)
    if refused and setting == "auto":
        return _uncached(setting, refused)
    store: PixelStore
    if refused:
        store = PixelStore(pixels_mark(encoder.processor, config.data.fast_jpeg), config.data)
    else:
        store = FeatureStore(model, parts, encoder.processor, config.data, engine)
    plain, kept = (partial(lay_out, one, shown, layout) for one in (encoder, encoder.keeping(store)))
    compare = partial(same_result, model, engine, [plain], [kept])
    verdict = _same_inputs(plain, kept) if refused else attempted(compare, "features in place of pixels")
    fits, evidence = agreed(verdict, engine)
    if not fits:
        return _uncached(setting, evidence)
    what = f"not cached ({refused}), but pixels are," if refused else "cached"
    return ImageCache(
        store, f"features   {what} {'on disk' if config.data.caches_on_disk else 'in memory'} ({evidence})"
    )


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
    if setting == "auto" and seen_once and not data.caches_on_disk:
        return "auto: each image is needed once"
    return None


def _uncached(setting: str, reason: str) -> ImageCache:
    if setting in ("memory", "disk"):
        raise ConfigError(f"data.cache_features={setting}: {reason}; use auto or off")
    return ImageCache(None, f"features   computed each time ({reason})")


def rewrites_agree(model: Any, encoder: Encoder, sample: Sequence[Record], engine: Engine) -> bool:
    """Whether loss and gradients are the same with the fast forms of modules (`models.rewrites`) as without.

    True if the model has none. The result is logged. One row of `sample` with images and one without are computed, each
    alone: a module's plain form may keep more than training does.
    """
    if not rewrites.is_used(model):
        return True
    of_kind = {bool(record.images): record for record in reversed(sample)}
    batches = [partial(padded, encoder, [record]) for record in of_kind.values()]

    def compare() -> Verdict:
        with Comparison(model, engine).running() as both:
            with rewrites.plain(model):
                both.plain(batches)
            return both.other(batches)

    fits, evidence = agreed(attempted(compare, "faster forms of its modules"), engine)
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
