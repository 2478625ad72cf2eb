"""Answers by generation, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmtune.config import GenerationConfig
from vlmtune.data.batch import padded
from vlmtune.data.encode import Encoder
from vlmtune.data.records import Record
from vlmtune.models.parts import base_of


def generation_arguments(generation: GenerationConfig, encoder: Encoder, model: Any) -> dict[str, Any]:
    """Arguments of `model.generate` for our generation config; temperature 0 is greedy."""
    own = base_of(model).generation_config.eos_token_id
    ends = set(encoder.end_ids) | set(own if isinstance(own, list) else [own] if own is not None else [])
    pad = encoder.tokenizer.pad_token_id
    arguments: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "eos_token_id": sorted(ends),
        "pad_token_id": pad if pad is not None else min(ends),
        "do_sample": generation.temperature > 0,
        "suppress_tokens": encoder.image_ids,  # an image in an answer would want features that no one gave
    }
    if generation.temperature > 0:
        arguments |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    else:  # values that the checkpoint's own generation config may carry, and that greedy search would warn about
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    return arguments


@torch.no_grad()
def generate(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    generation: GenerationConfig,
    *,
    batch_size: int,
    autocast: Callable[[], Any],
    advance: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """One answer per record, in order. `advance` is told how many rows each batch finished."""
    device = next(model.parameters()).device
    arguments = generation_arguments(generation, encoder, model)
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        rows = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        batch = padded(encoder, rows, answered=False, side="left").to(device)
        with autocast():
            out = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=True,
                **batch.inputs,
                **arguments,
            )
        answers += encoder.decode(out[:, batch.input_ids.shape[1] :].tolist())
        advance(len(rows))
    model.train(was_training)
    return answers
