"""Features of frozen image encoders, computed once per image and run, sweep or machine.

With the vision tower and the projector frozen, what the language model sees of an image never changes. Features are
kept under a mark of everything they depend on: weights, processor, number types, versions.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtune.config.schema import DataConfig
from vlmtune.launch.engine import Engine
from vlmtune.models.chance import varies
from vlmtune.models.parts import Parts, base_of
from vlmtune.prompt.cache_folder import Entry
from vlmtune.prompt.families import Processed
from vlmtune.prompt.image_cache import PixelStore, joined, pixels_mark

FROZEN = ("vision", "projector")
"""Parts whose weights an image's features depend on."""


class FeatureStore(PixelStore):
    """Looks images up, and computes what is missing with the model's own encoder."""

    kind = "features"

    def __init__(self, model: Any, parts: Parts, processor: Any, config: DataConfig, engine: Engine):
        self.model, self.engine = base_of(model), engine
        self.exact: dict[Any, bool] = {}
        """Whether so many images of a shape come out together as they do alone, bit by bit."""
        super().__init__(fingerprint(self.model, parts, processor, engine, config.fast_jpeg), config)

    def compute(self, processed: Sequence[Processed]) -> list[Entry]:
        """Entries from the processor's tensors and expansions of each group, those of equal shapes together."""
        alike: dict[Any, list[int]] = {}
        for n, (inputs, _) in enumerate(processed):
            alike.setdefault(_shape(inputs), []).append(n)
        made: dict[int, Entry] = {}
        for shape, places in alike.items():
            for start in range(0, len(places), TOGETHER):
                part = places[start : start + TOGETHER]
                made |= zip(part, self._alike(shape, [processed[n] for n in part]), strict=True)
        return [made[n] for n in range(len(processed))]

    def _alike(self, shape: Any, images: Sequence[Processed]) -> list[Entry]:
        """Encode images of one shape together, if the first try with so many was bit-equal to one by one."""
        kind = (shape, len(images))
        if len(images) == 1 or self.exact.get(kind):
            return self._encoded(images)
        alone = [entry for image in images for entry in self._encoded([image])]
        if kind not in self.exact:
            try:
                self.exact[kind] = all(map(_equal, alone, self._encoded(images)))
            except (ValueError, TypeError, RuntimeError, IndexError):  # takes one at a time, or no memory for several
                self.exact[kind] = False
        return alone

    @torch.no_grad()
    def _encoded(self, images: Sequence[Processed]) -> list[Entry]:
        """Entries of images of one shape from one call of the encoder."""
        encode = self.model.base_model.get_image_features
        taken = inspect.signature(encode).parameters
        inputs, _ = joined([Entry(*image) for image in images])
        arguments = {key: value.to(self.engine.device) for key, value in inputs.items() if key in taken}
        with self.engine.autocast():
            output = encode(**arguments, return_dict=True)
        pooled, deepstack = output.pooler_output, getattr(output, "deepstack_features", None) or []
        stacked, entries = isinstance(pooled, Tensor), []
        for n, (own, expansions) in enumerate(images):
            grids = {key: value for key, value in own.items() if key.endswith("_grid_thw")}
            features, *layers = (_share(values, n, len(images)) for values in [pooled, *deepstack])
            kept = [_kept(t) for t in ([features] if stacked else features)]
            entries.append(Entry(grids, expansions, kept, stacked, [[_kept(t) for t in layer] for layer in layers]))
        return entries


TOGETHER = 4
"""Images that are encoded in one call at most; more are no faster, and take more memory."""


def _shape(inputs: dict[str, Tensor]) -> Any:
    """Equal for images that take the same way through the encoder: shapes, and grids, sizes and masks whole."""
    return tuple(
        (key, *value.shape, None if value.is_floating_point() else _digest(value)) for key, value in inputs.items()
    )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.contiguous().numpy().data, digest_size=16).digest()


def _share(values: Any, n: int, count: int) -> Any:
    """The n-th of `count` equal shares of a tensor's rows or a list's items."""
    each = len(values) // count
    return values[n * each : (n + 1) * each]


def _equal(a: Entry, b: Entry) -> bool:
    pairs = zip([a.pooled, *a.deepstack], [b.pooled, *b.deepstack], strict=True)
    return all(len(x) == len(y) and all(map(torch.equal, x, y)) for x, y in pairs)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def refusal(model: Any, parts: Parts) -> str | None:
    """Why features of this model can't be kept, or None where they can."""
    base = base_of(model)
    if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        return f"{type(base).__name__} doesn't accept features in place of pixels"
    trained = {parts.of(name) for name, p in model.named_parameters() if p.requires_grad} & set(FROZEN)
    if trained:
        return f"the {' and the '.join(sorted(trained))} train"
    for name, module in base.named_modules():
        if parts.of(name) in FROZEN and varies(module):
            return f"{name} ({type(module).__name__}) gives different features for one image each time"
    return None


def fingerprint(model: Any, parts: Parts, processor: Any, engine: Engine, fast_jpeg: bool = True) -> str:
    """A hash of all that an image's features depend on, the image excepted."""
    described = [pixels_mark(processor, fast_jpeg), type(model).__name__, engine.mixed_precision, engine.device.type]
    digest = hashlib.sha256("\n".join(map(str, described)).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and parts.of(name) in FROZEN:
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
