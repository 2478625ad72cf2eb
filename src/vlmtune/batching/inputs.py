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
    decoder = base_of(model).get_decoder()
    if not takes_masks(decoder):
        raise ValueError(f"{decoder.config._attn_implementation} only knows padding, and no mask of branches")
    if "position_ids" not in inputs:
        inputs["position_ids"] = shared_positions(inner_of(model), batch)
    inputs.pop("mm_token_type_ids", None)  # only needed to compute the positions
    return {**inputs, "attention_mask": branch_mask(batch.branches)}


def inner_of(model: Any) -> Any:
    """The part of a model that computes positions: transformers' model without the output embedding."""
    return getattr(base_of(model), "model", None)


def shared_positions(inner: Any, batch: Batch) -> Tensor:
    """Positions of a shared batch: [B, T], or [3, B, T] under mRoPE. `inner`: as `inner_of` returns it."""
    assert batch.branches is not None
    prefix = (batch.branches == 0).long()
    own = own_positions(inner, batch, prefix)
    return branch_positions((prefix.cumsum(1) - 1).clamp(min=0) if own is None else own, batch.branches)


def own_positions(inner: Any, batch: Batch, mask: Tensor) -> Tensor | None:
    """The positions [3, B, T] of the tokens in `mask` [B, T], as the model itself computes them; None without mRoPE."""
    rope_index = getattr(inner, "get_rope_index", None)
    if rope_index is None or "mm_token_type_ids" not in batch.inputs:
        return None
    grids = {key: value for key, value in batch.inputs.items() if key.endswith("_grid_thw")}
    types = batch.inputs["mm_token_type_ids"]
    positions: Tensor = rope_index(batch.input_ids, mm_token_type_ids=types, attention_mask=mask, **grids)[0]
    return positions
