"""The arguments of a model's forward pass, for both batch layouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmtune.batching.layout import Batch, branch_mask, branch_positions
from vlmtune.models.attention import takes_masks
from vlmtune.models.parts import base_of


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass, for both batch layouts."""
    inputs = {"input_ids": batch.input_ids, "use_cache": False, **batch.inputs}
    if batch.branches is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    decoder = base_of(getattr(model, "module", model)).get_decoder()
    if not takes_masks(decoder):
        raise ValueError(f"{decoder.config._attn_implementation} only knows padding, and no mask of branches")
    positions = prefix_positions(model, batch)
    inputs.pop("mm_token_type_ids", None)  # only needed to compute the positions
    mask = branch_mask(batch.branches)
    return {**inputs, "attention_mask": mask, "position_ids": branch_positions(positions, batch.branches)}


def prefix_positions(model: Any, batch: Batch) -> Tensor:
    """Positions of the prefix tokens as the model itself would compute them: [B, T], or [3, B, T] under mRoPE."""
    assert batch.branches is not None
    prefix = (batch.branches == 0).long()
    rope_index = getattr(getattr(base_of(getattr(model, "module", model)), "model", None), "get_rope_index", None)
    if rope_index is None or "mm_token_type_ids" not in batch.inputs:
        return (prefix.cumsum(1) - 1).clamp(min=0)
    grids = {key: value for key, value in batch.inputs.items() if key.endswith("_grid_thw")}
    types = batch.inputs["mm_token_type_ids"]
    return rope_index(batch.input_ids, mm_token_type_ids=types, attention_mask=prefix, **grids)[0]
