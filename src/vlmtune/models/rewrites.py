"""Exact rewrites of what torch or transformers compute slowly on a CPU; measured in docs/results.md."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ATTENTION = "sdpa_in_float32"


def rewrite(model: Any, device: torch.device, compute_dtype: torch.dtype) -> list[str]:
    """Rewrite `model` in place where that is faster on `device`; returns what was done."""
    from transformers.activations import QuickGELUActivation

    if device.type != "cpu":
        return []
    done = ["freed memory kept"] if compute_dtype == torch.bfloat16 and keep_freed_memory() else []
    patches = [module for module in model.modules() if type(module) is nn.Conv3d and _one_step(module)]
    for module in patches:
        module.__class__ = PatchMatmul
    if patches:
        done.append("patch embedding as one matmul")
    activations = [module for module in model.modules() if type(module) is QuickGELUActivation]
    for module in activations:
        module.__class__ = QuickGELU
    if activations:
        done.append("quick GELU in one step")
    if compute_dtype == torch.bfloat16 and getattr(model.config, "_attn_implementation", "") == "sdpa":
        _register()
        subs = {key: getattr(model.config, key) for key in model.config.sub_configs}
        using = [key for key, own in subs.items() if own is not None and own._attn_implementation == "sdpa"]
        model.set_attn_implementation(dict.fromkeys(["", *using], ATTENTION))
        done.append("attention in float32")
    return done


def length_multiple(device: torch.device, compute_dtype: torch.dtype) -> int:
    """What batches' lengths are rounded up to. bfloat16 products on a CPU are set up anew for each new shape, which
    takes longer than a few more tokens and holds memory for each.
    """
    return 16 if device.type == "cpu" and compute_dtype == torch.bfloat16 else 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks below 32 MB for the next ones, instead of handing their pages back and taking others,
    which the system clears each time. Returns False where the C library is another.
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(set_option(mmap_threshold, 2**25) and set_option(trim_threshold, 2**26))


def _one_step(module: nn.Conv3d) -> bool:
    return module.kernel_size == module.stride and module.groups == 1 and set(module.padding) == {0}


class PatchMatmul(nn.Conv3d):
    """A convolution of single patches [N, C, T, H, W], each of the kernel's size, as the product that it is."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), as silu(1.702 x) / 1.702."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _QuickGELU.apply(input)
        return out


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        steep = x * 1.702
        ctx.save_for_backward(steep)
        return F.silu(steep).div_(1.702)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (steep,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.silu_backward(grad, steep)  # the two factors of 1.702 cancel out
        return out


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _sdpa_in_float32)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _sdpa_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa on bfloat16 inputs [B, heads, T, D], computed in float32."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = (
        attention_mask.float() if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
    )
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return out.to(query.dtype), None
