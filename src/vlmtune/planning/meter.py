"""Counts the bytes of a forward and backward pass that is computed on the meta device: shapes, and no numbers.

A storage counts from the operation that makes it until nothing refers to it any more, as on a real device. So what
autograd keeps, what checkpointing frees and computes again, and what only lives within an operation all count as they
would there.

Floating-point tensors are on the meta device. Integers and booleans (token ids, positions, sizes of images, masks) are
real and on the CPU, because models read their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
aten = torch.ops.aten
EQUAL = (aten.eq.Scalar, aten.eq.Tensor)
INTEGER_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


class Meter(TorchDispatchMode):
    """Counts what is allocated inside the context. `existing`: tensors that exist before, and don't count.

    `phase` is set from outside; each has a peak of its own.
    """

    def __init__(self, existing: Iterable[Tensor]):
        super().__init__()
        self.phase = 0
        self.live, self.gradients = 0, 0
        """Bytes at this moment: everything, and how much of it are gradients of weights."""
        self.peaks: dict[int, tuple[int, int]] = {}
        """By phase: the most bytes, and the part of gradients at that moment."""
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self.of_gradients: set[int] = set()

    def is_gradient(self, weight: Tensor) -> None:
        """A hook after a weight's gradient is complete: its storage counts as a gradient from now on."""
        assert weight.grad is not None
        key = weight.grad.untyped_storage()._cdata
        if self.sizes.get(key) and key not in self.of_gradients:
            self.of_gradients.add(key)
            self.gradients += self.sizes[key]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        weakref.finalize(storage, self._freed, key)
        if self.live > self.peaks.get(self.phase, (-1, 0))[0]:
            self.peaks[self.phase] = (self.live, self.gradients)

    def _freed(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.live -= size
        if key in self.of_gradients:
            self.of_gradients.remove(key)
            self.gradients -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())] if kwargs else [*_tensors(args)]
        if func in EQUAL and tensors[0].device == META:
            out = torch.zeros(tensors[0].shape, dtype=torch.bool)  # no pixel is exactly the 0 of a missing image
            self._note(out)
            return out
        if any(tensor.device == META for tensor in tensors):
            if func is aten._to_copy.default:
                kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # to where token ids are
            if func is aten._local_scalar_dense.default and tensors[0].dtype is torch.bool:
                return True  # whether something is as it should be: no padding, no infinite value
            if func is aten.index.Tensor or any(tensor.device != META for tensor in tensors):
                indexed = func is aten.index.Tensor
                args = tuple(_on_meta(value, indexed) for value in args)
                kwargs = {name: _on_meta(value, indexed) for name, value in kwargs.items()}
        elif kwargs.get("device") == META and not _makes_floats(func, args, kwargs, tensors):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*args, **kwargs)
        for value in _tensors((out,)):
            self._note(value)
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _on_meta(value: Any, indexed: bool) -> Any:
    """An argument of an operation on the meta device. A boolean index whose values are not known takes everything."""
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(each, indexed) for each in value)
    if not isinstance(value, Tensor):
        return value
    if indexed and value.dtype is torch.bool:
        return torch.ones(value.shape, dtype=torch.bool) if value.device == META else value
    return value if value.device == META else value.to(META)


def _makes_floats(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether an operation that is asked to make a tensor on the meta device makes one of floating point."""
    dtype = kwargs.get("dtype")
    if dtype is None and tensors:
        dtype = tensors[0].dtype
    if dtype is None:
        return not (func in INTEGER_RANGES and all(isinstance(value, int) for value in args))
    return bool(dtype.is_floating_point)
