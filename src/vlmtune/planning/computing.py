"""How a device computes what the meta device can't: fused attention, and mixed precision.

The meta device has no fused attention (it would count all T x T scores) and no autocast. Both are done here as CUDA and
a CPU do them, as far as memory is concerned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    *(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.einsum),
}
"""What autocast computes in the lower type. Source: torch's documentation of automatic mixed precision."""
FULL = {
    *(F.layer_norm, F.group_norm, F.normalize, F.softmax, F.log_softmax, F.softplus, F.cross_entropy, F.nll_loss),
    *(torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp),
    *(Tensor.exp, torch.log, Tensor.log, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod),
}
"""What it computes in float32."""


class Computing(TorchFunctionMode):
    """`dtype`: the lower type of autocast; None without it."""

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self.cast_weights: dict[Tensor, Tensor] = {}
        """Trained weights in the lower type. Autocast keeps them until the forward pass is over."""
        self.keeps_weights = True

    def end_forward(self) -> None:
        """From here on weights are cast each time: what is computed again leaves autocast after each layer."""
        self.cast_weights.clear()
        self.keeps_weights = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = self.dtype if func in LOWER else torch.float32 if func in FULL else None
        if self.dtype is not None and target is not None:
            args = tuple(self._cast(value, target) for value in args)
            kwargs = {name: self._cast(value, target) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cast(each, dtype) for each in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        is_weight = value.is_leaf and value.requires_grad and dtype is self.dtype
        if not (is_weight and self.keeps_weights):
            return value.to(dtype)
        if value not in self.cast_weights:
            self.cast_weights[value] = value.to(dtype)
        return self.cast_weights[value]


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Attention.apply(query, key, value)
    return out


class _Attention(torch.autograd.Function):
    """Fused attention: keeps its inputs, its output and one float32 for each query. A mask is the caller's own."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
