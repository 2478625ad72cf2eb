"""Proof before the first step, on real rows: what is trained on is what was meant, and what should learn can."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from vlmtune import display
from vlmtune.data.batch import Batch, padded
from vlmtune.data.encode import IGNORE, Encoder
from vlmtune.data.records import Record
from vlmtune.errors import DataError, TrainingError
from vlmtune.loss import summed_loss
from vlmtune.models.parts import Parts, summary


def check_labels(encoder: Encoder, records: Sequence[Record]) -> str:
    """Raise DataError unless the supervised tokens of each record decode to its answer and the end token."""
    example = ""
    encoded = encoder.encode(records, answered=True)
    for record, labels in zip(records, encoded.labels, strict=True):
        pieces = encoder.pieces(len(record.images), len(record.turns))
        text = encoder.tokenizer.decode([i for i in labels if i != IGNORE], skip_special_tokens=False)
        wanted = pieces.separator + record.answers[0] + pieces.tail
        if _composed(text) != _composed(wanted):
            raise DataError(
                f"{record.place}: would train on {text!r} in place of {wanted!r}; this tokenizer can't write it"
            )
        example = example or text
    return f"labels     {len(records)} rows decode to their answers and an end token, the first to {example!r}"


def _composed(text: str) -> str:
    """The form of a text that tokenizers compare in: they may compose accents and drop outer space."""
    return unicodedata.normalize("NFC", text).strip()


def check_gradients(model: Any, encoder: Encoder, records: Sequence[Record], engine: Any) -> str:
    """Raise TrainingError unless every trainable tensor gets a gradient, and no frozen one does.

    Zero is a gradient too: LoRA's A has none but zeros while B is zero.
    """
    was_training = model.training
    model.train()
    batch: Batch = padded(encoder, records).to(engine.device)
    try:
        with engine.autocast():
            loss = summed_loss(model, batch)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # layers that PEFT or the quantizer wrapped, but can't compute with
        raise TrainingError(
            f"the first forward and backward pass fails with {type(error).__name__}: {error}. This model, adapter and "
            "quantization don't go together here"
        ) from error
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    leaking = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    trained = sum(p.requires_grad for p in model.parameters())
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if leaking:
        raise TrainingError(f"{len(leaking)} frozen weights get a gradient, among them {leaking[0]}")
    if len(without) == trained:
        raise TrainingError("no trainable weight gets a gradient from these rows")
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss of the first rows is {float(loss)}; try trainer.precision=fp32")
    note = f"; {len(without)} get none from these rows, among them {without[0]}" if without else ""
    return f"gradients  reach {trained - len(without)} of {trained} trainable tensors and no frozen one{note}"


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
