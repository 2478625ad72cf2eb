"""A run's state in main memory, copied: training goes on while it is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmtune.models.sharding import full, own_share
from vlmtune.record.progress import Progress


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run's state after a step. Training changes nothing in it any more."""

    step: int
    best_step: int | None
    tensors: dict[str, dict[str, Tensor]]
    """By file: `model` and `optimizer`."""
    state: str
    """The rest, as JSON."""


def take(
    model: torch.nn.Module,
    optimizer: Any,
    scaler: Any,
    progress: Progress,
    identity: dict[str, Any],
) -> Snapshot:
    """Copy a run's state to main memory: its trained weights, the optimizer's state and how far it has come.

    `identity`: what a run that resumes from here is compared with (`resume.identity`).
    """
    moments, rest = split_state(optimizer.state_dict())
    state = {"progress": dataclasses.asdict(progress), "identity": identity, "optimizer": rest}
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    tensors = {"model": trained_tensors(model), "optimizer": moments}
    copies = {file: {name: _copy(tensor) for name, tensor in each.items()} for file, each in tensors.items()}
    return Snapshot(progress.step, progress.best_step, copies, json.dumps(state, indent=1))


def _copy(tensor: Tensor) -> Tensor:
    return full(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)


def contribute(model: torch.nn.Module, optimizer: Any) -> None:
    """Give the first process, which calls `take`, this one's shares of a sharded model and its optimizer's state."""
    for tensor in [*trained_tensors(model).values(), *split_state(optimizer.state_dict())[0].values()]:
        full(tensor.detach())


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Everything in a model that training changes: trainable weights and saved buffers."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | saved_buffers(model)


def saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that a model saves with its weights, such as a batch norm's averages: training may change them."""
    saved = set()
    for prefix, module in model.named_modules():
        own = set(module._buffers) - module._non_persistent_buffers_set
        saved |= {f"{prefix}.{name}" if prefix else name for name in own}
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def not_finite(model: torch.nn.Module) -> str | None:
    """The name of a tensor that training changes and that holds NaN or infinite values; None if there is none."""
    own = {name: own_share(tensor)[0] for name, tensor in trained_tensors(model).items()}
    return next((name for name, tensor in own.items() if not bool(torch.isfinite(tensor).all())), None)


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors and the rest, which JSON can hold. Keys are paths, since
    bitsandbytes nests its state.
    """
    flat = dict(_leaves(state["state"]))
    tensors = {path: value for path, value in flat.items() if isinstance(value, Tensor)}
    rest = {path: value for path, value in flat.items() if path not in tensors}
    return tensors, {"values": rest, "param_groups": state["param_groups"]}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def join_state(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split_state`."""
    state: dict[int, dict[str, Any]] = {}
    for path, value in [*tensors.items(), *rest["values"].items()]:
        index, *inner, name = path.split(".")
        place = state.setdefault(int(index), {})
        for key in inner:
            place = place.setdefault(key, {})
        place[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
