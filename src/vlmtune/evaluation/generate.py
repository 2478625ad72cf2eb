"""Batched generation of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmtune.batching.layout import padded, shared
from vlmtune.config.schema import GenerationConfig
from vlmtune.data.records import Record
from vlmtune.evaluation.branches import greedy_branches
from vlmtune.models.parts import base_of
from vlmtune.prompt.encode import Encoder


def generation_arguments(generation: GenerationConfig, encoder: Encoder, model: Any) -> dict[str, Any]:
    """Arguments of `model.generate` for our generation config; temperature 0 is greedy."""
    own = base_of(model).generation_config.eos_token_id
    ends = set(encoder.answers.end_ids) | set(own if isinstance(own, list) else [own] if own is not None else [])
    pad = encoder.tokenizer.pad_token_id
    arguments: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "eos_token_id": sorted(ends),
        "pad_token_id": pad if pad is not None else min(ends),
        "do_sample": generation.temperature > 0,
        "suppress_tokens": encoder.answers.image_ids,  # an image token in an answer would need features
    }
    if generation.temperature > 0:
        arguments |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    else:  # values that the checkpoint's generation config may contain, and that greedy search warns about
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    return arguments


CHANGES_LOGITS = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "guidance_scale",
    "exponential_decay_length_penalty",
)
"""Keys of a checkpoint's generation config that make greedy search choose a token other than the most likely one."""


def is_plain_greedy(arguments: dict[str, Any], model: Any) -> bool:
    """Whether `generate` always chooses the most likely token."""
    own = base_of(model).generation_config
    neutral: tuple[Any, ...] = (None, 0, 1, 1.0, [])
    return (
        not arguments["do_sample"]
        and (getattr(own, "num_beams", 1) or 1) == 1
        and all(getattr(own, name, None) in neutral for name in CHANGES_LOGITS)
    )


@torch.no_grad()
def generate(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    generation: GenerationConfig,
    *,
    batch_size: int,
    autocast: Callable[[], Any],
    share: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """One answer per record, in order. `advance` is called with the number of rows that each batch finished.

    `share`: neighbouring records of one group share their image, if decoding is plain greedy search.
    """
    device = next(model.parameters()).device
    arguments = generation_arguments(generation, encoder, model)
    share = share and is_plain_greedy(arguments, model)
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        rows = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        with autocast():
            if share:
                out = greedy_branches(model, shared(encoder, rows, answered=False).to(device), **arguments)
            else:
                batch = padded(encoder, rows, answered=False, side="left").to(device)
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.inputs}
                # each process by itself, also with a model that is sharded, which is gathered here
                made = model.generate(use_cache=True, synced_gpus=False, **inputs, **arguments)
                out = made[:, batch.input_ids.shape[1] :].tolist()
        answers += encoder.answers.decode(out)
        advance(len(rows))
    model.train(was_training)
    return answers
