"""The batches that a plan is made for: of a local processor and real rows, or assumed ones of a family's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.layout import Batch, padded
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError
from vlmtune.planning.meter import META
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.labels import IGNORE

Batches = Callable[[int], Batch]
"""Makes the batch of this many rows."""


@dataclass(frozen=True)
class Row:
    """The longest row, counted in tokens."""

    image: int | None
    """None: as many as the family gives an image."""
    text: int = 60
    """Question and answer, and what the chat template writes around them."""
    answer: int = 20


def of_records(encoder: Encoder, rows: Sequence[Record]) -> Batches:
    """Padded batches that repeat these rows."""
    return lambda count: on_meta(padded(encoder, [rows[number % len(rows)] for number in range(count)]))


def on_meta(batch: Batch) -> Batch:
    """The batch with its pixels on the meta device: what a Meter wants."""
    moved = {
        name: value.to(META) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    return replace(batch, inputs=moved)


def assumed(architecture: Any, row: Row) -> Batches:
    """Rows of one image each. Raises ConfigError for a family whose inputs are not known here."""
    shape = shape_of(architecture)
    count = shape.tokens(row.image)
    length = (count if shape.in_text else 1) + row.text
    token = next(getattr(architecture, name) for name in TOKENS if getattr(architecture, name, None) is not None)

    def batch(rows: int) -> Batch:
        ids = torch.full((rows, length), 10)
        ids[:, 2 : 2 + (count if shape.in_text else 1)] = token
        labels = torch.full_like(ids, IGNORE)
        labels[:, -row.answer :] = 10
        inputs = shape.inputs(rows, count)
        for name in shape.types:
            inputs[name] = (ids == token).long()
        if not shape.in_text:
            inputs["image_attention_mask"] = torch.ones(rows, length, 1, dtype=torch.long)
        return Batch(ids, torch.ones_like(ids), labels, inputs, rows=rows)

    return batch


TOKENS = ("image_token_id", "image_token_index", "pad_token_id")
"""Where config classes keep the token that stands for a piece of an image; Idefics' has none in its embedding."""


class Fixed:
    """Every image has one size (LLaVA 1.5, Gemma 3, PaliGemma), and so many tokens."""

    in_text = True
    types: tuple[str, ...] = ()

    def __init__(self, architecture: Any, count: int, types: tuple[str, ...] = ()):
        self.count, self.types, self.vision = count, types, architecture.vision_config

    def tokens(self, most: int | None) -> int:
        return self.count

    def inputs(self, rows: int, count: int) -> dict[str, Tensor]:
        return {"pixel_values": _pixels(rows, 3, *_sides(self.vision))}


class Crossed(Fixed):
    """Idefics: one token in the text; images are seen by cross-attention."""

    in_text = False

    def inputs(self, rows: int, count: int) -> dict[str, Tensor]:
        return {"pixel_values": _pixels(rows, 1, 3, *_sides(self.vision))}


class Patches(Fixed):
    """Qwen: an image of any size, in patches of which a square makes a token."""

    def __init__(self, architecture: Any, types: tuple[str, ...]):
        super().__init__(architecture, 16384, types)

    def tokens(self, most: int | None) -> int:
        return most or self.count

    def inputs(self, rows: int, count: int) -> dict[str, Tensor]:
        down = next(side for side in range(int(count**0.5), 0, -1) if count % side == 0)
        merge = self.vision.spatial_merge_size
        grid = torch.tensor([[1, down * merge, count // down * merge]] * rows)
        channels = getattr(self.vision, "in_channels", 3)
        width = channels * self.vision.temporal_patch_size * self.vision.patch_size**2
        return {"pixel_values": _pixels(rows * count * merge**2, width), "image_grid_thw": grid}


class Tiles(Fixed):
    """InternVL: tiles of the same tokens, and an overview. With `row`: each row's tiles are a dimension (Idefics3)."""

    def __init__(self, architecture: Any, each: int, most: int, *, by_row: bool):
        super().__init__(architecture, each)
        self.most, self.by_row = most, by_row

    def tokens(self, most: int | None) -> int:
        pieces = min(max((most or self.count * self.most) // self.count, 1), self.most)
        return self.count * pieces

    def inputs(self, rows: int, count: int) -> dict[str, Tensor]:
        pieces, sides = count // self.count, _sides(self.vision)
        if not self.by_row:
            return {"pixel_values": _pixels(rows * pieces, 3, *sides)}
        mask = torch.ones(rows, pieces, *sides, dtype=torch.bool)
        return {"pixel_values": _pixels(rows, pieces, 3, *sides), "pixel_attention_mask": mask}


class Grids(Fixed):
    """LLaVA-NeXT and OneVision: an overview and the tiles of a grid, with a token after each row of patches."""

    def __init__(self, architecture: Any):
        side = architecture.vision_config.image_size // architecture.vision_config.patch_size
        super().__init__(architecture, side**2)
        self.side, self.sides = side, _sides(architecture.vision_config)
        limit = str(getattr(architecture, "vision_aspect_ratio", "")).rpartition("anyres_max_")[2]
        self.limit = int(limit) if limit.isdigit() else None
        self.grids = {self._tokens(grid): tuple(grid) for grid in architecture.image_grid_pinpoints}

    def _tokens(self, grid: Sequence[int]) -> int:
        """Of an image that fills the grid. OneVision shrinks its features to the size of `limit` tiles."""
        down, across = (length // self.sides[0] * self.side for length in grid)
        if self.limit is not None and (ratio := (down * across / (self.limit * self.count)) ** 0.5) > 1.1:
            down, across = int(down // ratio), int(across // ratio)
        return self.count + down * across + down

    def tokens(self, most: int | None) -> int:
        allowed = [count for count in self.grids if count <= (most or count)]
        if not allowed:
            raise ConfigError(f"model.image.max_tokens={most}: this family's images have at least {min(self.grids)}")
        return max(allowed)

    def inputs(self, rows: int, count: int) -> dict[str, Tensor]:
        size = self.grids[count]
        tiles = 1 + size[0] * size[1] // (self.sides[0] * self.sides[1])
        return {"pixel_values": _pixels(rows, tiles, 3, *self.sides), "image_sizes": torch.tensor([size] * rows)}


def shape_of(architecture: Any) -> Fixed:
    """How images of a family become tensors. Raises ConfigError for one that is not known here."""
    kind, vision = architecture.model_type, architecture.vision_config
    if kind.startswith("qwen"):
        return Patches(architecture, ("mm_token_type_ids",))
    if kind in ("llava_next", "llava_onevision"):
        return Grids(architecture)
    if kind == "internvl":
        return Tiles(architecture, architecture.image_seq_length, 13, by_row=False)
    if kind in ("idefics3", "smolvlm"):
        each = (vision.image_size // vision.patch_size // architecture.scale_factor) ** 2
        return Tiles(architecture, each, 17, by_row=True)
    if kind == "idefics":
        return Crossed(architecture, 1)
    if kind == "gemma3":
        return Fixed(architecture, architecture.mm_tokens_per_image, ("token_type_ids",))
    if kind in ("llava", "paligemma"):
        types = ("token_type_ids",) if kind == "paligemma" else ()
        return Fixed(architecture, (vision.image_size // vision.patch_size) ** 2, types)
    raise ConfigError(f"model: the inputs of {kind} are not known here; give a local folder with its processor")


def _sides(vision: Any) -> tuple[int, int]:
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _pixels(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)
