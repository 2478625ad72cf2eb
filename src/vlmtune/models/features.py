"""Features of frozen image encoders, computed once per image and run, sweep or machine.

With the vision tower and the projector frozen, what the language model sees of an image never changes. Features are
kept under a mark of everything they depend on: weights, processor, number types, versions.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor

from vlmtune.config import DataConfig
from vlmtune.models.image_cache import Entry, Pixels, pixels_mark
from vlmtune.models.parts import Parts, base_of

FROZEN = ("vision", "projector")
"""Parts whose weights an image's features depend on."""


class Features(Pixels):
    """Looks images up, and computes what is missing with the model's own encoder."""

    kind = "features"

    def __init__(self, model: Any, parts: Parts, processor: Any, config: DataConfig, engine: Any):
        self.model, self.engine = base_of(model), engine
        super().__init__(fingerprint(self.model, parts, processor, engine, config.fast_jpeg), config)

    @torch.no_grad()
    def compute(self, inputs: dict[str, Any], expansions: list[str]) -> Entry:
        """One entry from the processor's tensors."""
        encode = self.model.base_model.get_image_features
        taken = inspect.signature(encode).parameters
        arguments = {key: value.to(self.engine.device) for key, value in inputs.items() if key in taken}
        with self.engine.autocast():
            output = encode(**arguments, return_dict=True)
        pooled, deepstack = output.pooler_output, getattr(output, "deepstack_features", None) or []
        stacked = isinstance(pooled, Tensor)
        return Entry(
            {key: value for key, value in inputs.items() if key.endswith("_grid_thw")},
            expansions,
            [_kept(t) for t in ([pooled] if stacked else pooled)],
            stacked,
            [[_kept(t) for t in layer] for layer in deepstack],
        )


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def refusal(model: Any, parts: Parts) -> str | None:
    """Why features of this model can't be kept, or None where they can."""
    base = base_of(model)
    if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        return f"{type(base).__name__} takes no features in place of pixels"
    trained = {parts.of(name) for name, p in model.named_parameters() if p.requires_grad} & set(FROZEN)
    if trained:
        return f"the {' and the '.join(sorted(trained))} train"
    for name, module in base.named_modules():
        if parts.of(name) in FROZEN and _varies(module):
            return f"{name} ({type(module).__name__}) gives an image other features each time"
    return None


def _varies(module: torch.nn.Module) -> bool:
    """Whether a module in training mode depends on chance or on the rest of the batch."""
    chances = ("p", "drop_prob", "attention_dropout", "dropout")
    at_random = any(isinstance(p := getattr(module, name, None), float) and p > 0 for name in chances)
    return at_random or isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def fingerprint(model: Any, parts: Parts, processor: Any, engine: Any, fast_jpeg: bool = True) -> str:
    """A hash of all that an image's features depend on, the image excepted."""
    described = [pixels_mark(processor, fast_jpeg), type(model).__name__, engine.mixed_precision, engine.device.type]
    digest = hashlib.sha256("\n".join(map(str, described)).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and parts.of(name) in FROZEN:
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
