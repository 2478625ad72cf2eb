"""A batch -> its summed loss. Logits are computed for supervised positions only.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.data.batch import Batch, branch_mask, branch_positions
from vlmtune.data.encode import IGNORE
from vlmtune.models.parts import base_of


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy summed over the supervised tokens of `batch`, in float32.

    The output embedding sees [N, D] instead of [B, T, D]: answers are a few tokens, images hundreds.
    """
    if batch.supervised == 0:  # only keeps another rank company: a zero that still reaches every weight
        return model(**model_inputs(model, batch)).logits.float().sum() * 0.0
    logits, targets = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] where a supervised token is predicted, and those tokens [N], row by row of the batch."""
    targets = torch.full_like(batch.labels, IGNORE)
    targets[:, :-1] = batch.labels[:, 1:]
    chosen = targets != IGNORE
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
