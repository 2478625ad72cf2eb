"""Quantized linear layers without weights: the bytes that they are stored in, and what they keep of a pass.

Sources: Dettmers et al. 2023, arXiv:2305.14314 (nf4, double quantization); bitsandbytes' autograd functions; PEFT's
layers over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.config.schema import MethodConfig
from vlmtune.models.parts import Parts
from vlmtune.models.quantization import linear_layers, whole_modules

BLOCK, SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own under double quantization."""


class Packed(nn.Linear):
    """A linear layer whose frozen weight is stored in `bits`; made from a plain one in place."""

    bits: int
    dtype: torch.dtype
    """What it computes in."""
    stored: int
    """Bytes of the weight as it is stored."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Product.apply(input.to(self.dtype), self.weight, self.bits == 8)
        return out if self.bias is None else out + self.bias.to(self.dtype)


class _Product(torch.autograd.Function):
    """Unpacks the whole weight for a product, in both directions. 8 bits keep the input, 4 bits only the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps: bool) -> Tensor:
        ctx.save_for_backward(weight, *([x] if keeps else []))
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ torch.empty_like(ctx.saved_tensors[0], dtype=grad.dtype), None, None


def pack(model: nn.Module, parts: Parts, quantization: MethodConfig, dtype: torch.dtype) -> None:
    """Turn the layers of `model` that `quantization` names into packed ones. Raises ConfigError as loading does."""
    if quantization.method is None:
        return
    whole = whole_modules(model, parts, quantization)
    for name, part in linear_layers(model, parts):
        if part in quantization.parts and not any(f"{name}.".startswith(f"{other}.") for other in whole):
            layer: Any = model.get_submodule(name)
            layer.__class__ = Packed
            layer.bits = 8 if quantization.method == "bitsandbytes_8bit" else 4
            layer.dtype, layer.stored = dtype, stored_bytes(layer, quantization)


def stored_bytes(layer: nn.Linear, quantization: MethodConfig) -> int:
    """Bytes of a quantized weight with its scales."""
    count = layer.weight.numel()
    if quantization.method == "bitsandbytes_8bit":
        return count + 4 * layer.out_features
    blocks = -(-count // BLOCK)
    double = quantization.fields.get("bnb_4bit_use_double_quant", False)
    scales = blocks + 4 * -(-blocks // SCALES) if double else 4 * blocks
    return -(-count // 2) + scales


def adapt_packed(model: nn.Module) -> None:
    """Let plain LoRA over packed layers compute as PEFT's own layers for bitsandbytes do: without casts under autocast,
    and with a copy of the base's result.
    """
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, Packed) and type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.__class__ = _over_packed(type(module))


def _over_packed(plain: Any) -> Any:
    class OverPacked(plain):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = self.active_adapters[0]
            if self.lora_variant:
                return super().forward(x, *args, **kwargs)  # DoRA's own way
            out = self.base_layer(x).clone()
            inner = self.lora_A[name](self.lora_dropout[name](x))
            return out + self.lora_B[name](inner) * self.scaling[name]

    return OverPacked
