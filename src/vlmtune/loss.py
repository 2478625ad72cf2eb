"""A batch -> its summed loss. Logits are computed for supervised positions only.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmtune.data.batch import Batch, branch_mask, branch_positions
from vlmtune.data.encode import IGNORE
from vlmtune.models.parts import base_of


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy summed over the supervised tokens of `batch`, in float32.

    The output embedding sees [N, D] instead of [B, T, D]: answers are a few tokens, images hundreds.
    """
    if batch.supervised == 0:  # only keeps another rank company: a zero that still reaches every weight
        return model(**model_inputs(model, batch)).logits.float().sum() * 0.0
    base = base_of(getattr(model, "module", model))
    width = base.get_output_embeddings().weight.shape[0]
    if batch.supervised * width > MOST_LOGITS and not _after_the_head(base.config):
        return _in_chunks(model, batch, MOST_LOGITS // width or 1)
    logits, targets = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


MOST_LOGITS = 2**26
"""Logits that are held at once: 256 MB in float32, and as much again for their gradient."""


def _after_the_head(config: Any) -> bool:
    """Whether a model changes its logits after the output embedding (Gemma's soft cap, Cohere's scale)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))


def _in_chunks(model: Any, batch: Batch, size: int) -> Tensor:
    """The summed loss with the logits of `size` tokens in memory at a time; the backward pass computes them again."""
    targets, chosen = _targets(batch)
    head = base_of(getattr(model, "module", model)).get_output_embeddings()
    hidden: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0][chosen])  # [N, D]
        return (args[0][:, :1], *args[1:])

    select = head.register_forward_pre_hook(keep)
    try:
        unused = model(**model_inputs(model, batch)).logits
    finally:
        select.remove()

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    pairs = zip(hidden[0].split(size), targets[chosen].split(size), strict=True)
    losses = [checkpoint(part, states, wanted, use_reentrant=False) for states, wanted in pairs]
    return torch.stack(losses).sum() + unused.float().sum() * 0.0  # keeps DDP's view of which weights are used


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """What each place [B, T] is to predict, and where that is supervised."""
    targets = torch.full_like(batch.labels, IGNORE)
    targets[:, :-1] = batch.labels[:, 1:]
    return targets, targets != IGNORE


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] where a supervised token is predicted, and those tokens [N], row by row of the batch."""
    targets, chosen = _targets(batch)
    head = base_of(getattr(model, "module", model)).get_output_embeddings()
    select = head.register_forward_pre_hook(lambda _, args: (args[0][chosen][None], *args[1:]))
    try:
        logits = model(**model_inputs(model, batch)).logits  # [1, N, V]
    finally:
        select.remove()
    return logits[0], targets[chosen]


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass for either layout of a batch."""
    inputs = {"input_ids": batch.input_ids, "use_cache": False, **batch.inputs}
    if batch.branches is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    positions = prefix_positions(model, batch)
    inputs.pop("mm_token_type_ids", None)  # served the positions
    mask = branch_mask(batch.branches)
    return {**inputs, "attention_mask": mask, "position_ids": branch_positions(positions, batch.branches)}


def prefix_positions(model: Any, batch: Batch) -> Tensor:
    """Positions of the prefix tokens as the model itself would give them: [B, T], or [3, B, T] under mRoPE."""
    assert batch.branches is not None
    prefix = (batch.branches == 0).long()
    rope_index = getattr(getattr(base_of(getattr(model, "module", model)), "model", None), "get_rope_index", None)
    if rope_index is None or "mm_token_type_ids" not in batch.inputs:
        return (prefix.cumsum(1) - 1).clamp(min=0)
    grids = {key: value for key, value in batch.inputs.items() if key.endswith("_grid_thw")}
    types = batch.inputs["mm_token_type_ids"]
    return rope_index(batch.input_ids, mm_token_type_ids=types, attention_mask=prefix, **grids)[0]
