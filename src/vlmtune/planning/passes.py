"""The memory of a forward and backward pass, of a model of full depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from vlmtune.batching.layout import Batch
from vlmtune.batching.preparation import Preparation
from vlmtune.config.schema import Config
from vlmtune.models.parts import base_of
from vlmtune.objectives.next_token import summed_loss
from vlmtune.planning.architecture import EXACT, SHALLOW, layers_of, shallow
from vlmtune.planning.computing import Computing
from vlmtune.planning.meter import Meter
from vlmtune.planning.rows import Batches
from vlmtune.planning.skeleton import Machine, Skeleton, build

TOWER, FORWARD, BACKWARD, TOWER_BACKWARD = range(4)
"""Phases of a pass, each with a peak of its own: that of a deep model may be in another phase than a shallow one's."""


@dataclass(frozen=True)
class Passing:
    """Bytes at the moment when a pass holds the most, besides weights and the optimizer's state."""

    activations: float
    """What layers keep and work with, logits, and the batch itself."""
    gradients: float
    """Of the weights, as far as they are computed at that moment."""

    @property
    def total(self) -> float:
        return self.activations + self.gradients


def passing(config: Config, architecture: Any, machine: Machine, batches: Batches, rows: int) -> Passing:
    """A pass over `rows` rows. A deep model's is extrapolated from two shallow ones, phase by phase: each further layer
    adds the same.
    """
    layers = layers_of(architecture)
    depths = SHALLOW if layers > EXACT and not _differ(config) else (layers,)
    found = []
    for depth in depths:
        skeleton = build(config, shallow(architecture, depth), machine)
        found.append(measured(skeleton, config, machine, batches(rows)))
    peaks = found[0]
    if len(depths) > 1:
        further = (layers - depths[0]) / (depths[1] - depths[0])
        peaks = {phase: _extrapolated(low, found[1][phase], further) for phase, low in found[0].items()}
    return max(peaks.values(), key=lambda peak: peak.total)


def _differ(config: Config) -> bool:
    """Whether the adapter's fields treat some layers otherwise than others."""
    fields = config.adapter.fields
    names = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
    return any(fields.get(name) for name in names) or any(
        any(letter.isdigit() for letter in str(name).replace("_proj", ""))
        for key in ("target_modules", "exclude_modules", "modules_to_save")
        for name in fields.get(key) or []
        if not isinstance(fields.get(key), str)
    )


def _extrapolated(low: Passing, high: Passing, further: float) -> Passing:
    return Passing(
        low.activations + (high.activations - low.activations) * further,
        low.gradients + (high.gradients - low.gradients) * further,
    )


def measured(skeleton: Skeleton, config: Config, machine: Machine, batch: Batch) -> dict[int, Passing]:
    """The peaks of a pass by phase, where gradients are kept that of a second one."""
    batch = Preparation.of(skeleton.model, machine)(batch)  # type: ignore[arg-type]
    meter = Meter([*skeleton.tensors(), *_tensors_of(batch)])
    with _hooked(skeleton, meter, frees=config.optimizer.step_in_backward), meter:
        for _ in range(2 if keeps_gradients(config, machine) else 1):
            _pass(skeleton.model, batch, machine, meter)
    own = sum(tensor.nbytes for tensor in _tensors_of(batch))
    found = {phase: Passing(held - kept + own, kept) for phase, (held, kept) in meter.peaks.items()}
    skeleton.model.zero_grad(set_to_none=True)
    return found


def keeps_gradients(config: Config, machine: Machine) -> bool:
    """Whether gradients are there already when a pass begins: those of an earlier pass, or DDP's own."""
    several = machine.num_processes > 1 and config.sharding.name == "none"
    return (several or config.trainer.gradient_accumulation_steps > 1) and not config.optimizer.step_in_backward


def _pass(model: Any, batch: Any, machine: Machine, meter: Meter) -> None:
    computing = Computing(machine.autocast)
    meter.phase = TOWER
    with computing:
        loss = summed_loss(model, batch)
        computing.end_forward()
        meter.phase = BACKWARD
        # torch.autograd.backward would leave `computing` while it runs, and checkpointing computes layers again in it
        options = {"allow_unreachable": True, "accumulate_grad": True}
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)


@contextmanager
def _hooked(skeleton: Skeleton, meter: Meter, *, frees: bool) -> Iterator[None]:
    """Inside, weights report their gradients (and free them, with `optimizer.step_in_backward`), and the decoder
    reports where the phases end.
    """

    def complete(weight: Tensor) -> None:
        meter.is_gradient(weight)
        if frees:
            weight.grad = None

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        meter.phase = FORWARD
        embedded = kwargs.get("inputs_embeds")
        if embedded is not None and embedded.requires_grad:
            embedded.register_hook(partial(_enter_phase, meter))

    handles = [weight.register_post_accumulate_grad_hook(complete) for weight in skeleton.trained()]
    handles.append(base_of(skeleton.model).get_decoder().register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter_phase(meter: Meter, _: Tensor) -> None:
    meter.phase = TOWER_BACKWARD


def _tensors_of(batch: Any) -> list[Tensor]:
    return [value for value in (*vars(batch).values(), *batch.inputs.values()) if isinstance(value, Tensor)]
