"""What a run uses of `accelerate.Accelerator`."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Engine(Protocol):
    """Processes, devices and number types of a run; `session.engine` makes it."""

    device: torch.device
    num_processes: int
    process_index: int
    is_main_process: bool
    mixed_precision: str
    """`no`, `bf16` or `fp16`."""
    scaler: Any
    """The gradient scaler of fp16; None otherwise."""
    ddp_handler: Any
    """The options of the wrapper around a model on several ranks."""

    def prepare(self, *objects: Any) -> Any: ...
    def prepare_model(self, model: Any, *, evaluation_mode: bool) -> Any: ...
    def autocast(self) -> Any: ...
    def no_sync(self, model: Any) -> Any: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any: ...
    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor: ...
    def wait_for_everyone(self) -> None: ...
