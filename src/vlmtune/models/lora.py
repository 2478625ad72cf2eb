"""A linear layer with LoRA as one step of autograd, in place of five: base, A, B, scaling, sum.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with W [O, I] and b frozen. Sums up inside the products, and keeps x and x A^T only.

    The weights are kept as they are stored and cast again in the backward pass: a copy in the compute type would stay
    in memory until then, one of W for each layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows, w, down, up = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
        inner = rows @ down.t()  # [N, r]
        out = rows @ w.t() if bias is None else torch.addmm(bias.to(dtype), rows, w.t())
        out.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scaling, ctx.shape, ctx.x_type = scaling, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        w, down, up = weight.to(rows.dtype), a.to(rows.dtype), b.to(rows.dtype)
        grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)  # [N, O]
        of_inner = (grad @ up).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ w).addmm_(of_inner, down).view(ctx.shape).to(ctx.x_type)
        of_a = (of_inner.t() @ rows).to(a.dtype)
        of_b = (grad.t() @ inner).mul_(ctx.scaling).to(b.dtype)
        return of_x, None, None, of_a, of_b, None, None


def in_one_step(layer: Any, x: Tensor) -> Tensor | None:
    """What PEFT's LoRA `layer` makes of x [..., I], or None where it is more than the plain product: dropout, several
    adapters or none, a variant (DoRA), a base that is quantized or whose weight or bias trains, biases of A or B,
    types that differ outside autocast.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]]
    if type(base) is not nn.Linear or any(p.requires_grad for p in base.parameters()):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    if layer.training and not isinstance(layer.lora_dropout[names[0]], nn.Identity):
        return None
    device, dtype = x.device.type, x.dtype
    if device != "meta" and torch.is_autocast_enabled(device):  # torch knows no autocast for shapes alone
        dtype = torch.get_autocast_dtype(device)
    elif not dtype == base.weight.dtype == down.weight.dtype:
        return None
    scaling = layer.scaling[names[0]]
    out: Tensor = LoraProduct.apply(x, base.weight, base.bias, down.weight, up.weight, scaling, dtype)
    return out
