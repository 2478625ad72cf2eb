"""An optimizer that updates one weight tensor at a time: bf16 weights that train, and three ways to save memory."""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmtune.models.sharding import own_share

ROUNDINGS = "roundings"
"""In a tensor's state: how often it was rounded. Its next noise follows from this number."""
AT_ONCE = 2**24
"""Entries that are rounded at once: 64 MB of noise."""


class Tensorwise(torch.optim.Optimizer):
    """Drives `inner`, an optimizer of torch or bitsandbytes, for one tensor after the other.

    `inner` updates each tensor with its own state, as if it had only this one. It gets the tensor itself, or a
    temporary copy of it, which is written back:

    - `stochastic`: a copy in fp32 of a bf16 tensor, and its gradient in fp32. The result is rounded up or down at
      random, so that its mean is the fp32 result. Nearest rounding loses each update below 1/512 of a weight, which
      are most of them at the learning rates of fine-tuning. Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020,
      arXiv:2010.06192.
    - `offload`: a copy on the CPU, where the state stays and the update is computed.

    `in_backward`: each tensor is updated in the backward pass, as soon as its gradient is complete, and the gradient
    is freed. `step` then has nothing left to do.

    The noise follows from `seed`, the tensor's index, its number of updates and, where the tensor is sharded, the
    number of the share. It is the same after a resume, and in whatever order gradients arrive; ranks with the same
    weights have the same noise. The layout of the state is that of `inner`, plus `ROUNDINGS`.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, stochastic: bool, offload: bool, in_backward: bool, seed: int):
        super().__init__(inner.param_groups, {})
        self.inner, self.stochastic, self.offload, self.in_backward = inner, stochastic, offload, in_backward
        self.seed = seed
        self.parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self.index = {parameter: index for index, parameter in enumerate(self.parameters)}
        self.norms: dict[Tensor, Tensor] = {}
        for group in self.param_groups if in_backward else []:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._apply, group=group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    @torch.no_grad()
    def _apply(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Update a tensor in the backward pass, and free its gradient."""
        assert parameter not in self.norms, "a second gradient in one step: the first is applied already"
        assert parameter.grad is not None
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._update(parameter, group)
        parameter.grad = None

    def applied_norm(self) -> Tensor | None:
        """L2 norm of all gradients that were applied since the last call; None without `in_backward`."""
        if not self.in_backward:
            return None
        norms = [self.norms[p] for p in self.parameters if p in self.norms]
        self.norms.clear()
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        device, dtype = self._computed_in(parameter)
        copied = (device, dtype) != (parameter.device, parameter.dtype)
        weight, state = parameter, self.state[parameter]
        if copied:  # contiguous, since fused steps want weight, gradient and state in one layout
            options: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": torch.contiguous_format}
            weight = parameter.detach().to(**options)
            weight.grad = parameter.grad.to(**options)
        self.inner.param_groups = [{**group, "params": [weight]}]
        self.inner.state = defaultdict(dict, {weight: state})
        self.inner.step()
        self.inner.param_groups[0]["params"].clear()  # or the copy of the last tensor stays in memory
        self.inner.state.clear()
        if not copied:
            return
        if dtype != parameter.dtype:
            state[ROUNDINGS] = state.get(ROUNDINGS, 0) + 1
            share, number = own_share(weight)
            round_to_bf16(share, self._noise(parameter, state[ROUNDINGS], number, device))
        parameter.copy_(weight)

    def _computed_in(self, parameter: Tensor) -> tuple[torch.device, torch.dtype]:
        """Where and in which type a tensor is updated."""
        rounded = self.stochastic and parameter.dtype is torch.bfloat16
        device = torch.device("cpu") if self.offload else parameter.device
        return device, torch.float32 if rounded else parameter.dtype

    def _noise(self, parameter: Tensor, count: int, share: int, device: torch.device) -> torch.Generator:
        seed = zlib.crc32(f"{self.seed} {self.index[parameter]} {count}{f' {share}' * (share > 0)}".encode())
        return torch.Generator(device).manual_seed(seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of `inner`. Raises ValueError if it is that of other weights.

        torch's own method would give every tensor the type of its weight, and bitsandbytes' would move paged tensors
        to the device.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("its groups of weights have other sizes")
        for group, values in zip(self.param_groups, saved, strict=True):
            group |= {key: value for key, value in values.items() if key != "params"}
        self.state.clear()
        for index, state in state_dict["state"].items():
            parameter = self.parameters[index]
            self.state[parameter] = {name: self._placed(name, v, parameter) for name, v in _flat(state).items()}

    def _placed(self, name: str, value: Any, parameter: Tensor) -> Any:
        """A value of a loaded state, where and in the form that `inner` keeps it."""
        if not isinstance(value, Tensor):
            return value
        paged = getattr(self.inner, "is_paged", None)  # None: not bitsandbytes
        if paged and name in ("state1", "state2"):
            return self.inner.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
        device, dtype = self._computed_in(parameter)
        keeps_type = paged is not None or name == "step"
        return value.to(device) if keeps_type else value.to(device, dtype)


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one tensor without the level that bitsandbytes' `state_dict` adds."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def round_to_bf16(tensor: Tensor, generator: torch.Generator) -> None:
    """Round an fp32 tensor in place to values that bf16 has, up or down with a probability that keeps the mean.

    bf16 is the upper half of fp32's bits: a random number added to the lower half carries over with the probability
    that the lower half stands for. Infinities and NaN stay.
    """
    for piece in tensor.view(-1).view(torch.int32).split(AT_ONCE):
        noise = torch.empty_like(piece).random_(0, 2**16, generator=generator)
        noise.masked_fill_(piece.view(torch.float32).isnan(), 0)  # all bits of a GPU's NaN are set: it would become 0
        piece.add_(noise).bitwise_and_(-(2**16))
