"""Proof before the first step, on real rows: what is trained on is what was meant, and what should learn can."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from vlmtune import display
from vlmtune.batching.layout import Batch, padded, shared
from vlmtune.batching.loader import Batches
from vlmtune.config.schema import Config, GenerationConfig, ImageConfig
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.models.parts import Parts, summary
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.families import Family
from vlmtune.prompt.labels import IGNORE
from vlmtune.prompt.reference import by_the_processor

log = logging.getLogger("vlmtune")


def check_labels(encoder: Encoder, records: Sequence[Record]) -> str:
    """Raise DataError unless each row trains on its answer and the end token, token by token.

    The last answer: all that follows the very tokens that generation starts from. Each answer: its added tokens are
    those that its text names, in order, and all its tokens decode to its text.
    """
    example = ""
    encoded = encoder.encode(records, answered=True)
    starts = encoder.encode(records, answered=False).input_ids
    for record, ids, labels, start in zip(records, encoded.input_ids, encoded.labels, starts, strict=True):
        runs = [list(run) for supervised, run in groupby(labels, IGNORE.__ne__) if supervised]
        texts = [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]
        wanted = encoder.supervised_texts(record)
        if list(map(encoder.added_tokens.comparable, texts)) != list(map(encoder.added_tokens.comparable, wanted)):
            raise DataError(
                f"{record.place}: would train on {texts!r} in place of {wanted!r}; this tokenizer can't write it"
            )
        if set(labels) & set(encoder.answers.image_ids):
            raise DataError(f"{record.place}: would train on the tokens of an image: {texts!r}")
        if [i for run in runs for i in encoder.added_tokens.among(run)] != encoder.named_tokens(record):
            raise DataError(f"{record.place}: added tokens of the answer are not those tokens in {texts!r}")
        if len(runs) == 1 and (ids[: len(start)] != start or labels[len(start) :] != ids[len(start) :]):
            raise DataError(f"{record.place}: generation would start from other tokens than training on {texts!r}")
        example = example or texts[-1]
    return f"labels     {len(records)} rows lead to their answers and an end token, the first to {example!r}"


def check_inputs(encoder: Encoder, records: Sequence[Record]) -> str:
    """Raise ModelError unless a row of each shape reaches the model as its family's processor would write it by itself:
    the same tokens, and every tensor that it returns.

    Families that have code of their own are held against their processors in the tests; what is looked for here is a
    family that the generic way does not cover.
    """
    if type(encoder.family) is not Family or not records:
        return f"inputs     made by {type(encoder.family).__name__}"
    shapes = {encoder.prompt.shape(record): record for record in reversed(records)}
    made = [_check_input(encoder, record) for record in list(shapes.values())[:SHAPES]]
    names = sorted({name for found in made for name in found})
    named = f"{type(encoder.processor).__name__}: {', '.join(names)}"
    return f"inputs     the tokens and tensors of {named} ({len(made)} shapes of row)"


SHAPES = 16
"""Shapes of row that are held against the processor."""


def _check_input(encoder: Encoder, record: Record) -> list[str]:
    ours, theirs = padded(encoder, [record]), by_the_processor(encoder, record, answered=True)
    name = type(encoder.processor).__name__
    made = {"input_ids", "attention_mask", *ours.inputs}
    if missing := sorted(set(theirs) - made):
        raise ModelError(
            f"{name}: also returns {', '.join(missing)} for a prompt, which the generic way does not make; this family "
            "needs a class of its own (docs/add_a_model.md)"
        )
    [prompt] = encoder.encode([record], answered=False).input_ids
    [whole] = encoder.encode([record], answered=True).input_ids
    alone = by_the_processor(encoder, record, answered=False)["input_ids"][0].tolist()
    answered = theirs["input_ids"][0].tolist()
    merged = answered[: len(prompt)] != prompt  # a token across the answer's beginning, which generation never writes
    if alone != prompt or (not merged and encoder.prompt.supervise == "last" and answered != whole):
        raise ModelError(f"{record.place}: {name} writes this row in other tokens than ours; please report this model")
    return sorted(made)


def check_images(encoder: Encoder, records: Sequence[Record], budget: ImageConfig) -> str:
    """What the images of `records` really cost in language-model tokens; a very thin one may exceed the budget."""
    token = encoder.tokenizer.convert_tokens_to_ids(encoder.family.feature_token)
    shown = [record for record in records if record.images]
    if not shown:
        return "images     none in these rows"
    ids = encoder.encode(shown, answered=False).input_ids
    counts = [row.count(token) / len(record.images) for row, record in zip(ids, shown, strict=True)]
    thin = "; a thin image exceeds model.image.max_tokens" if max(counts) > (budget.max_tokens or max(counts)) else ""
    tokens = f"{min(counts):g}" if min(counts) == max(counts) else f"{min(counts):g} to {max(counts):g}"
    return f"images     {tokens} tokens each, in rows of {min(map(len, ids))} to {max(map(len, ids))} tokens{thin}"


def choose_layout(model: Any, batches: Batches, engine: Any, evaluated: bool) -> str:
    """Choose between padded and shared batches by `trainer.share_prefix`; returns the choice with its reason.

    `auto` compares loss and gradients of both on a few rows of the user's own, on his own model. Families whose
    attention is not causal over a 4-D mask (cross-attention, bidirectional image tokens) differ or refuse.
    Raises ConfigError where `on` is asked for and would change the loss.
    """
    wish, probed = batches.trainer.share_prefix, batches.probes(min(6, batches.trainer.batch_size))
    if wish == "off" or not probed:
        nothing = "rows of a stream aren't grouped" if batches.streamed else "no rows share a prompt up to an image"
        reason = "trainer.share_prefix=off" if wish == "off" else nothing
        return f"batches    padded, one row each ({reason})"
    verdicts = [layouts_agree(model, batches.encoder, rows, engine) for rows in probed]
    evidence = next((evidence for fits, evidence in verdicts if not fits), verdicts[0][1])
    fits = session.all_ranks(all(fits for fits, _ in verdicts), engine)
    if not fits and wish == "on":
        raise ConfigError(f"trainer.share_prefix=on: {evidence}; use auto or off")
    batches.use_layout(share=fits)
    if fits and evaluated:
        agree = all(answers_agree(model, batches.encoder, rows, engine) for rows in probed)
        batches.share_answers = session.all_ranks(agree, engine)
    return f"batches    {'shared, each image once' if fits else 'padded, one row each'} ({evidence})"


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
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
        log.info("generation is not shared: this model refuses (%s)", str(error).splitlines()[0])
        return False
    return answers[0] == answers[1]


def layouts_agree(model: Any, encoder: Encoder, records: list[Record], engine: Any) -> tuple[bool, str]:
    """Whether both layouts of `records` give this model the same loss and gradients, and the evidence."""
    plain, branched = partial(padded, encoder, records), partial(shared, encoder, records)
    return _agree(model, engine, plain, branched, "the shared layout")


def choose_features(model: Any, parts: Parts, batches: Batches, config: Config, engine: Any, evaluated: bool) -> str:
    """Let the encoder keep image features by `data.cache_features`, or the processor's pixels where features can't be
    kept and a cache is asked for; returns the choice with its reason.

    Raises ConfigError where it is asked for and this model or run can't.
    """
    from vlmtune.models.features import Features, refusal
    from vlmtune.prompt.image_cache import Pixels, pixels_mark

    wish, encoder = config.data.cache_features, batches.encoder
    sample = [record for record in batches.sample(4) if record.images]
    if reason := _needs_no_cache(wish, batches, sample, engine, evaluated):
        return _uncached(wish, reason)
    refused = refusal(model, parts)
    if refused and wish == "auto":
        return _uncached(wish, refused)
    if refused:
        cache = Pixels(pixels_mark(encoder.processor, config.data.fast_jpeg), config.data)
    else:
        cache = Features(model, parts, encoder.processor, config.data, engine)

    def plain() -> Batch:
        return padded(encoder, sample)

    def kept() -> Batch:
        return padded(encoder.keeping(cache), sample)

    if refused is None:
        fits, evidence = _agree(model, engine, plain, kept, "features in place of pixels")
    else:
        fits, evidence = _same_inputs(plain, kept)
    if not session.all_ranks(fits, engine):
        return _uncached(wish, evidence)
    batches.encoder = encoder.keeping(cache)
    where = "on disk" if wish == "disk" else "in memory"
    return f"features   {f'not kept ({refused}), but pixels are, ' if refused else 'kept '}{where} ({evidence})"


def _needs_no_cache(wish: str, batches: Batches, sample: Sequence[Record], engine: Any, evaluated: bool) -> str | None:
    """Why nothing is kept of the images, whatever the model; None where something may be."""
    if wish == "off":
        return "data.cache_features=off"
    if batches.streamed:
        return "rows of a stream are seen once"
    if not sample:
        return "these rows have no images"
    if wish == "auto" and engine.device.type != "cpu":
        return "auto: only on a CPU"
    if wish == "auto" and not evaluated and batches.total_steps <= batches.order.steps_per_epoch:
        return "auto: each image is needed once"
    return None


def _uncached(wish: str, reason: str) -> str:
    if wish in ("memory", "disk"):
        raise ConfigError(f"data.cache_features={wish}: {reason}; use auto or off")
    return f"features   computed each time ({reason})"


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
    """Whether two forms of the same rows give the same loss and gradients, and the evidence as a sentence.

    Run in evaluation mode, so that dropout does not tell them apart.
    """
    was_training = model.training
    model.eval()
    try:
        first = _loss_and_gradient(model, plain(), engine)
        second = _loss_and_gradient(model, fast(), engine)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return False, f"this model refuses {name} ({str(error).splitlines()[0]})"
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    halves = (torch.float16, torch.bfloat16)
    half = engine.mixed_precision != "no" or any(p.dtype in halves for p in model.parameters())
    allowed = 5e-2 if half else 1e-3
    loss_gap = abs(first[0] - second[0]) / max(abs(first[0]), 1e-6)
    gradient_gap = float((first[1] - second[1]).norm() / first[1].norm().clamp(min=1e-12))
    found = f"loss differs by {loss_gap:.1e}, gradients by {gradient_gap:.1e} (relative; allowed {allowed:.0e})"
    return loss_gap <= allowed and gradient_gap <= allowed, found


COMPARED = 20_000_000
"""Gradient entries that are compared at most: those of the smallest tensors, which all lie behind the attention."""


def _loss_and_gradient(model: Any, batch: Batch, engine: Any) -> tuple[float, torch.Tensor]:
    """Summed loss, and gradients in one vector on the CPU."""
    model.zero_grad(set_to_none=True)
    with engine.autocast():
        loss = summed_loss(model, batch.to(engine.device))
    loss.backward()
    gradients = sorted((p.grad for p in model.parameters() if p.grad is not None), key=torch.Tensor.numel)
    sizes = itertools.accumulate(g.numel() for g in gradients)
    chosen = [g for g, size in zip(gradients, sizes, strict=True) if size <= COMPARED] or gradients[:1]
    return float(loss.detach()), torch.cat([g.flatten().float().cpu() for g in chosen])


def parts_table(model: Any, parts: Parts) -> str:
    """What is trainable, frozen and quantized, per part."""
    found = summary(model, parts)
    found["all"] = {key: sum(row[key] for row in found.values()) for key in ("total", "trainable", "quantized")}
    rows = [
        (
            part,
            display.size(row["total"]),
            display.size(row["trainable"]),
            display.size(row["total"] - row["trainable"]),
            display.size(row["quantized"]),
            f"{row['trainable'] / row['total']:.2%}",
        )
        for part, row in found.items()
    ]
    return display.table("Weights", ("part", "all", "trainable", "frozen", "quantized", "trainable share"), rows)
