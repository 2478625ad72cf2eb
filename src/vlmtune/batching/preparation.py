"""Everything of a forward pass that can be made without weights, so that worker processes make it.

On the device, transformers reads the sizes of images back to compute such tables: each time the processor waits for the
device. Only done for families whose source was read; tests compare the results bit by bit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.batching.inputs import inner_of, own_positions, shared_positions
from vlmtune.batching.layout import Batch
from vlmtune.launch.engine import Engine
from vlmtune.launch.session import DTYPES
from vlmtune.models.parts import base_of

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""`model_type` of the families whose positions and vision tables are made here."""
CASTS = (
    "qwen2_vl_vision",
    "qwen2_5_vl_vision",
    "qwen3_vl_vision",
    "qwen3_5_vision",
    "clip_vision_model",
    "siglip_vision_model",
    "internvl_vision",
    "idefics_vision",
    "idefics3_vision",
    "smolvlm_vision",
)
"""`model_type` of the vision towers that compute nothing with pixels before their first product, which casts them."""


@dataclass(frozen=True)
class Preparation:
    """Completes the batches of one model. Can be pickled: it has no weights."""

    inner: Any = None
    """The model's own function for positions: its class without weights. None: this family's are left to the model."""
    counts: bool = False
    """Whether the positions are plain numbers, so that nothing of the model is needed."""
    tower: Tower | None = None
    pixels: torch.dtype | None = None
    """What pixels are cast to; None: left as they are."""

    @classmethod
    def of(cls, model: Any, engine: Engine) -> Preparation:
        """What can be prepared for this model, under the run's precision."""
        inner, config = inner_of(model), base_of(model).config
        known = config.model_type in GRIDS
        casts = getattr(getattr(config, "vision_config", None), "model_type", None) in CASTS
        return cls(
            inner=_without_weights(inner) if known else None,
            counts=not hasattr(inner, "get_rope_index"),
            tower=Tower.of(inner.visual) if known else None,
            pixels=DTYPES.get(engine.mixed_precision) if casts else None,
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch with positions, vision tables, and pixels in the compute type."""
        inputs, on_host = {**batch.inputs, **self._positions(batch)}, batch.on_host
        if self.tower is not None and "pixel_values" in inputs:
            tables, read = self.tower.tables(inputs["image_grid_thw"])
            inputs, on_host = {**inputs, **tables}, on_host | read
        if self.pixels is not None:
            inputs = {name: _cast(name, value, self.pixels) for name, value in inputs.items()}
        return replace(batch, inputs=inputs, on_host=on_host)

    def _positions(self, batch: Batch) -> dict[str, Tensor]:
        """The argument `position_ids`; empty where the model computes it, or counts from 0 by itself."""
        if batch.branches is not None:
            return {"position_ids": shared_positions(self.inner, batch)} if self.counts or self.inner else {}
        if self.inner is None or "image_grid_thw" not in batch.inputs:
            return {}
        own = own_positions(self.inner, batch, batch.attention_mask)
        return {} if own is None else {"position_ids": own}


AS_IT_IS = Preparation()
"""Leaves everything to the model."""


def _without_weights(inner: Any) -> Any:
    """A module of the same class that has only the config, which is all that `get_rope_index` reads."""
    kind: Any = type(inner)
    shell = kind.__new__(kind)
    nn.Module.__init__(shell)
    shell.config = inner.config
    return shell


def _cast(name: str, value: Any, dtype: torch.dtype) -> Any:
    pixels = name.startswith("pixel_values") and isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if pixels else value


@dataclass(frozen=True)
class Tower:
    """The settings of a Qwen vision tower that its tables depend on (transformers/vision_utils.py)."""

    config: Any
    merge: int
    """Patches along a side of a token."""
    window: Mapping[str, int] | None
    """Arguments for the order of patches in windows (Qwen2.5-VL)."""
    interpolation: Mapping[str, Any] | None
    """Arguments for the interpolation of learned positions (Qwen3-VL)."""

    @classmethod
    def of(cls, tower: Any) -> Tower | None:
        """None if this version of transformers computes other tables than those known here."""
        used = {name for name in vars(sys.modules[type(tower).__module__]) if name.startswith("get_vision_")}
        if not used or used - {POSITIONS, LENGTHS, WINDOWS, INTERPOLATION}:
            return None
        window = {"window_size": tower.window_size, "patch_size": tower.patch_size} if WINDOWS in used else None
        interpolation = None
        if INTERPOLATION in used:
            interpolation = {
                "num_grid_per_side": tower.num_grid_per_side,
                "mode": tower.interpolation_mode,
                "align_corners": tower.interpolation_align_corners,
            }
        return cls(tower.config, tower.spatial_merge_size, window, interpolation)

    def tables(self, grid: Tensor) -> tuple[dict[str, Any], frozenset[str]]:
        """The model's arguments for images of these sizes [images, 3], and which of them it reads on the CPU."""
        from transformers import vision_utils
        from transformers.utils.generic import is_flash_attention_requested

        found: dict[str, Any] = {
            "image_position_ids": vision_utils.get_vision_position_ids(grid, self.merge),
            "image_cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        }
        if self.window is not None:
            index, lengths = vision_utils.get_vision_window_index(grid, self.merge, **self.window)
            found |= {"image_window_index": index, "image_cu_window_seqlens": lengths}
        if self.interpolation is not None:
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, spatial_merge_size=self.merge, **self.interpolation
            )
            found |= {"image_interp_indices": indices, "image_interp_weights": weights}
        lengths = {name for name in found if name.endswith("_seqlens")}
        if not is_flash_attention_requested(self.config):
            return found, frozenset({"image_grid_thw", *lengths})
        longest = {name.replace("cu_", "max_")[:-1]: int(found[name].diff().max()) for name in lengths}
        return found | longest, frozenset({"image_grid_thw", *longest})


POSITIONS, LENGTHS = "get_vision_position_ids", "get_vision_attention_seqlens"
WINDOWS, INTERPOLATION = "get_vision_window_index", "get_vision_interpolation_indices_and_weights"
"""What a vision tower's module imports of `vision_utils`."""
