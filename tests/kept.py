"""Counts what autograd keeps for the backward pass."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, `now` and `peak` are the bytes that graphs keep: of distinct storages that are not the
    model's own. What checkpointed layers keep while they are computed again is not seen.
    """

    def __init__(self, model: Any):
        own = [*model.parameters(), *model.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.uses: Counter[int] = Counter()
        self.now = self.peak = 0
        super().__init__(self._pack, lambda holder: holder.tensor)

    def __enter__(self) -> Kept:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Any:
        holder, storage = _Holder(tensor), tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.own:
            self._change(key, storage.nbytes(), 1)
            weakref.finalize(holder, self._change, key, storage.nbytes(), -1)
        return holder

    def _change(self, key: int, size: int, by: int) -> None:
        if self.uses[key] == max(-by, 0):  # its first use begins, or its last one ends
            self.now += by * size
        self.uses[key] += by
        self.peak = max(self.peak, self.now)


class _Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor
