"""Exact rewrites of what torch or transformers compute slowly; measured on a CPU in docs/results.md.

`model.rewrites=off` leaves them out, with the fused LoRA layers of `lora`; `plain` is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmtune.models.parts import base_of

ATTENTION = "sdpa_in_float32"


class Fast:
    """A module that gives what a plain one gives, faster. With `plain = True` it computes as the plain one does."""

    plain: bool = False


@dataclass(frozen=True)
class Form:
    """A form of a module that is faster, or needs less memory, than the plain one, and the devices that use it."""

    name: str
    everywhere: bool = False
    """Whether `model.rewrites=auto` uses it on accelerators too; if not, only `on` does there."""

    def used(self, setting: str, device: torch.device) -> bool:
        """Whether modules on `device` get this form under `model.rewrites=setting`."""
        return setting == "on" or (setting == "auto" and (self.everywhere or device.type == "cpu"))


PATCHES = Form("patch embedding as one matmul", everywhere=True)
"""torch 2.9's Conv3d takes 10 to 20 times as long in bfloat16 on some GPUs: pytorch #174051, #166643."""
QUICK_GELU = Form("quick GELU in one step")
LORA = Form("LoRA in one step")


def rewrite(model: Any, setting: str, device: torch.device, compute_dtype: torch.dtype) -> list[str]:
    """Replace in `model` what `model.rewrites=setting` replaces on `device`; returns what was done."""
    from transformers.activations import QuickGELUActivation

    done = []
    if PATCHES.used(setting, device) and _replace(model, _is_patch_embedding, PatchMatmul.of):
        done.append(PATCHES.name)
    if QUICK_GELU.used(setting, device) and _replace(model, lambda m: type(m) is QuickGELUActivation, QuickGELU):
        done.append(QUICK_GELU.name)
    halves_on_cpu = setting != "off" and device.type == "cpu" and compute_dtype == torch.bfloat16
    if halves_on_cpu and keep_freed_memory():
        done.append("freed memory kept")
    if halves_on_cpu and (using := _with_attention(model, "sdpa")):
        _register()
        model.set_attn_implementation(dict.fromkeys(using, ATTENTION))
        done.append("attention in float32")
    return done


def is_used(model: Any) -> bool:
    """Whether `model` computes anything in a faster form than the plain one."""
    fast = any(isinstance(module, Fast) and not module.plain for module in model.modules())
    return fast or bool(_with_attention(base_of(model), ATTENTION))


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """While inside, `model` computes the plain way, which the faster forms are compared with."""
    fast = [module for module in model.modules() if isinstance(module, Fast) and not module.plain]
    with attention(model, ATTENTION, "sdpa"):
        switch_off(model)
        try:
            yield
        finally:
            for module in fast:
                module.plain = False


@contextmanager
def attention(model: Any, name: str, other: str) -> Iterator[None]:
    """While inside, the parts of `model` whose attention is `name` compute with `other`."""
    base = base_of(model)
    using = _with_attention(base, name)
    if using:
        base.set_attn_implementation(dict.fromkeys(using, other))
    try:
        yield
    finally:
        if using:
            base.set_attn_implementation(dict.fromkeys(using, name))


def switch_off(model: Any) -> None:
    """Have `model` compute the plain way from here on."""
    for module in model.modules():
        if isinstance(module, Fast):
            module.plain = True
    if using := _with_attention(base_of(model), ATTENTION):
        base_of(model).set_attn_implementation(dict.fromkeys(using, "sdpa"))


def _replace(model: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> bool:
    """Put what `make` makes of it in the place of each wanted module; False where there is none."""
    found = [name for name, module in model.named_modules() if wanted(module)]
    for name in found:
        module = model.get_submodule(name)
        model.set_submodule(name, make(module).train(module.training))
    return bool(found)


def _with_attention(model: Any, name: str) -> list[str]:
    """The configs of `model` (`""`: the whole one, then its parts') that use this attention; none where it doesn't."""
    if getattr(model.config, "_attn_implementation", "") != name:
        return []
    parts = {key: getattr(model.config, key) for key in model.config.sub_configs}
    return ["", *(key for key, own in parts.items() if own is not None and own._attn_implementation == name)]


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


def _is_patch_embedding(module: nn.Module) -> bool:
    if type(module) is not nn.Conv3d:
        return False
    whole = module.kernel_size == module.stride and set(module.padding) == {0}
    return whole and module.groups == 1 and set(module.dilation) == {1}


class PatchMatmul(Fast, nn.Conv3d):
    """A convolution of single patches [N, C, T, H, W], each of the kernel's size, as the product that it is."""

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PatchMatmul:
        """The same convolution, with the weights of `convolution` themselves."""
        kernel: Any = convolution.kernel_size
        has_bias = convolution.bias is not None
        made = cls(convolution.in_channels, convolution.out_channels, kernel, kernel, bias=has_bias, device="meta")
        made.weight, made.bias = convolution.weight, convolution.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        if self.plain or input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


class QuickGELU(Fast, nn.Module):
    """x sigmoid(1.702 x), as silu(1.702 x) / 1.702."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.original(input) if self.plain else _QuickGELU.apply(input)
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
