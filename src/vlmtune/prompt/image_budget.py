"""Translates `model.image.min_tokens` and `max_tokens` into the settings of each family's image processor.

pixels      Qwen2-VL and its successors, GLM-4V     an image is scaled; one token covers (patch * merge)^2 pixels.
                                                    Sides are rounded up: one 50 times the other may exceed the bound
tiles       InternVL                                the number of tiles, each of the same tokens, and an overview
grids       LLaVA-NeXT, LLaVA-OneVision             the grids of tiles that an image may be fitted to
edge        Idefics3, SmolVLM                       the longest edge, in tiles
fixed       the others                              every image has the same number of tokens
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from vlmtune.config.schema import ImageConfig
from vlmtune.data.images import NeededSize
from vlmtune.errors import ConfigError


def set_image_budget(processor: Any, image: ImageConfig) -> None:
    """Bound the language-model tokens of an image. Marker tokens around an image are not counted.

    Raises ConfigError if the family can't stay within the bounds, with the values that it supports.
    """
    if image.min_tokens is None and image.max_tokens is None:
        return
    images = processor.image_processor
    if hasattr(images, "merge_size") and hasattr(images, "patch_size"):
        _set_pixels(images, image)
    elif hasattr(images, "max_patches"):
        _set_tiles(images, image, tokens_of(processor, images.size["width"], images.size["height"]))
    elif hasattr(images, "image_grid_pinpoints"):
        _set_grids(processor, image)
    elif hasattr(images, "max_image_size"):
        _set_edge(images, image, int(processor.image_seq_len))
    else:
        fixed = tokens_of(processor, 64, 64)
        least, most = image.min_tokens or fixed, image.max_tokens or fixed
        if not least <= fixed <= most:
            raise ConfigError(f"model.image: this family gives every image {fixed} tokens; leave both keys null")


def tokens_of(processor: Any, width: int, height: int) -> int:
    """Number of language-model tokens for an image of this size in pixels."""
    from vlmtune.prompt.families import family_of

    family = family_of(processor)
    _, [text] = family.images([[Image.new("RGB", (width, height))]])
    return text.count(family.feature_token)


def needed_size(processor: Any) -> NeededSize | None:
    """The largest size to which this family's processor scales an image; None if it cuts images into tiles."""
    images = processor.image_processor
    size = images.size
    if hasattr(images, "merge_size") and hasattr(images, "patch_size"):
        return NeededSize(pixels=int(size["longest_edge"]))
    if any(hasattr(images, name) for name in ("max_patches", "image_grid_pinpoints", "max_image_size")):
        return None
    sides = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    return NeededSize(side=max(sides)) if sides else None


def fit_model(model_config: Any, processor: Any) -> None:
    """Copy the remaining grids to the model's config, if it has its own list (LLaVA-NeXT and OneVision)."""
    grids = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if grids is not None and hasattr(model_config, "image_grid_pinpoints"):
        model_config.image_grid_pinpoints = [list(grid) for grid in grids]


def _set_pixels(images: Any, image: ImageConfig) -> None:
    pixels = (images.patch_size * images.merge_size) ** 2
    if type(images).__name__.startswith("Glm"):  # its limits count an image twice, as two frames
        pixels *= images.temporal_patch_size
    size = {"shortest_edge": images.size["shortest_edge"], "longest_edge": images.size["longest_edge"]}
    if image.min_tokens is not None:
        size["shortest_edge"] = image.min_tokens * pixels
    if image.max_tokens is not None:
        size["longest_edge"] = image.max_tokens * pixels
    if size["shortest_edge"] > size["longest_edge"]:
        raise ConfigError(
            f"model.image: at least {size['shortest_edge'] // pixels} but at most {size['longest_edge'] // pixels} "
            "tokens an image is impossible; set both min_tokens and max_tokens"
        )
    images.size = type(images.size)(**size)


def _set_tiles(images: Any, image: ImageConfig, each: int) -> None:
    """`each`: tokens per tile; several tiles are followed by an overview of the same size."""
    counts = {n: each * (n + (n > 1)) for n in range(1, images.max_patches + 1)}
    least, most = image.min_tokens or 0, image.max_tokens or max(counts.values())
    allowed = [n for n, tokens in counts.items() if least <= tokens <= most]
    if not allowed:
        raise ConfigError(f"model.image: this family's images have {_listed(counts.values())} tokens; none is allowed")
    images.min_patches, images.max_patches = max(images.min_patches, min(allowed)), max(allowed)


def _set_grids(processor: Any, image: ImageConfig) -> None:
    """Keep the grids on which no image has too many tokens: an image that fills its grid has the most."""
    images = processor.image_processor
    most_of = {tuple(grid): tokens_of(processor, grid[1], grid[0]) for grid in images.image_grid_pinpoints}
    if image.min_tokens is not None:
        raise ConfigError("model.image.min_tokens: this family fits images to grids of tiles, and has no lower bound")
    kept = [list(grid) for grid, tokens in most_of.items() if tokens <= (image.max_tokens or tokens)]
    if not kept:
        raise ConfigError(
            f"model.image.max_tokens={image.max_tokens}: this family's images may have {_listed(most_of.values())} "
            "tokens"
        )
    images.image_grid_pinpoints = kept


def _set_edge(images: Any, image: ImageConfig, each: int) -> None:
    """`each`: tokens per tile. A square image has the most: edge x edge tiles, and an overview."""
    tile = images.max_image_size["longest_edge"]
    edges = {n: each * (n * n + 1 if n > 1 else 1) for n in range(1, images.size["longest_edge"] // tile + 1)}
    if image.min_tokens is not None:
        raise ConfigError("model.image.min_tokens: this family cuts images into tiles, and has no lower bound")
    allowed = [n for n, tokens in edges.items() if tokens <= (image.max_tokens or tokens)]
    if not allowed:
        raise ConfigError(
            f"model.image.max_tokens={image.max_tokens}: this family's images may have {_listed(edges.values())} tokens"
        )
    images.size = type(images.size)(longest_edge=max(allowed) * tile)


def _listed(counts: Any) -> str:
    """`1 to 4`, or a list of the counts."""
    found = sorted(set(counts))
    return ", ".join(map(str, found)) if len(found) < 8 else f"{found[0]} to {found[-1]}"
