"""Checks of real rows that need no model: labels, tokens, images. Each check raises or returns a line for the log."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from vlmtune import display
from vlmtune.batching.layout import padded
from vlmtune.config.schema import ImageConfig
from vlmtune.data.records import Record
from vlmtune.errors import DataError, ModelError
from vlmtune.models.parts import Parts, summary
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.families import Family
from vlmtune.prompt.labels import IGNORE
from vlmtune.prompt.reference import by_the_processor


def check_labels(encoder: Encoder, records: Sequence[Record]) -> str:
    """Raise DataError unless each row trains on exactly its answer and the end token.

    The last answer must be everything after the tokens that generation starts from. In every answer, added tokens
    must be those named in its text, in order, and the tokens must decode to its text.
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
                f"{record.place}: would train on {texts!r} instead of {wanted!r}; this tokenizer can't represent it"
            )
        if set(labels) & set(encoder.answers.image_ids):
            raise DataError(f"{record.place}: would train on image tokens: {texts!r}")
        if [i for run in runs for i in encoder.added_tokens.among(run)] != encoder.named_tokens(record):
            raise DataError(f"{record.place}: the added tokens of the answer are encoded as other tokens in {texts!r}")
        if len(runs) == 1 and (ids[: len(start)] != start or labels[len(start) :] != ids[len(start) :]):
            raise DataError(f"{record.place}: the prompt tokens of training and generation differ before {texts!r}")
        example = example or texts[-1]
    return f"labels     {len(records)} rows train on their answer and an end token, the first on {example!r}"


def check_inputs(encoder: Encoder, records: Sequence[Record]) -> str:
    """Raise ModelError unless a row of each shape has the same tokens and tensors as the output of its family's own
    processor.

    Families with their own code are compared with their processors in the tests; this check finds families that the
    generic code does not cover.
    """
    if type(encoder.family) is not Family or not records:
        return f"inputs     made by the family class {type(encoder.family).__name__}"
    shapes = {encoder.prompt.shape(record): record for record in reversed(records)}
    made = [_check_input(encoder, record) for record in list(shapes.values())[:SHAPES]]
    names = sorted({name for found in made for name in found})
    named = f"{type(encoder.processor).__name__}: {', '.join(names)}"
    return f"inputs     equal to those of {named} ({len(made)} shapes of row)"


SHAPES = 16
"""Shapes of row that are compared with the processor's output."""


def _check_input(encoder: Encoder, record: Record) -> list[str]:
    ours, theirs = padded(encoder, [record]), by_the_processor(encoder, record, answered=True)
    name = type(encoder.processor).__name__
    made = {"input_ids", "attention_mask", *ours.inputs}
    if missing := sorted(set(theirs) - made):
        raise ModelError(
            f"{name}: also returns {', '.join(missing)} for a prompt, which the generic code does not support; this "
            "family needs its own class (docs/add_a_model.md)"
        )
    [prompt] = encoder.encode([record], answered=False).input_ids
    [whole] = encoder.encode([record], answered=True).input_ids
    alone = by_the_processor(encoder, record, answered=False)["input_ids"][0].tolist()
    answered = theirs["input_ids"][0].tolist()
    merged = answered[: len(prompt)] != prompt  # one token across the start of the answer
    if alone != prompt or (not merged and encoder.prompt.supervise == "last" and answered != whole):
        raise ModelError(f"{record.place}: {name} encodes this row with different tokens; please report this model")
    return sorted(made)


def check_images(encoder: Encoder, records: Sequence[Record], budget: ImageConfig) -> str:
    """The number of language-model tokens per image in `records`; a very thin image may exceed the budget."""
    token = encoder.tokenizer.convert_tokens_to_ids(encoder.family.feature_token)
    shown = [record for record in records if record.images]
    if not shown:
        return "images     these rows have none"
    ids = encoder.encode(shown, answered=False).input_ids
    counts = [row.count(token) / len(record.images) for row, record in zip(ids, shown, strict=True)]
    thin = "; a thin image exceeds model.image.max_tokens" if max(counts) > (budget.max_tokens or max(counts)) else ""
    tokens = f"{min(counts):g}" if min(counts) == max(counts) else f"{min(counts):g} to {max(counts):g}"
    return f"images     {tokens} tokens each, in prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens{thin}"


def parts_table(model: Any, parts: Parts) -> str:
    """A table of the trainable, frozen and quantized weights per part."""
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
