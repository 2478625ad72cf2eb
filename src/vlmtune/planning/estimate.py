"""The memory of a run on each of its GPUs: weights, gradients, optimizer and a pass, in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmtune.config.schema import Config, ImageConfig, OptimizerConfig
from vlmtune.models import sharding
from vlmtune.models.parts import base_of, hidden_matrices
from vlmtune.planning.passes import Passing, keeps_gradients, passing
from vlmtune.planning.rows import Batches
from vlmtune.planning.skeleton import Machine, Skeleton, build

CONTEXT = 2**30
"""Bytes for CUDA itself, its libraries, and gaps between tensors; an assumption. 0 on a CPU, where a process has its
libraries before."""
EIGHT_BIT = 2 * (1 + 4 / 256)
"""Bytes of the 8-bit optimizer's two states of a weight, with a float for 256 values of each."""
SMALLEST_IN_8_BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in fp32."""
NOISE = 4 * 2**24
"""Bytes of random numbers while a step is rounded (training.tensorwise)."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, or in a CPU process on top of what it holds before the model is opened."""

    weights: dict[tuple[str, str], int]
    """By part and type, of the whole model. `adapter`: what PEFT added."""
    kept: float
    """Of the weights, with FSDP a share and what is gathered at a time."""
    gradients: float
    """All of them together; 0 where each is freed as it arises."""
    state: float
    """The optimizer's."""
    update: float
    """Copies while a weight is updated."""
    passing: Passing
    updates_in_backward: bool
    context: float
    startup: float
    """Of what comes before the first step, where that may be more: a model is opened whole and shared out later."""
    host: float = 0.0
    """What is kept in the machine's main memory instead, or moved there when the GPU is full."""

    @property
    def step(self) -> float:
        """What comes and goes in a step: at the most in the pass, or in the update after it."""
        if self.updates_in_backward:
            return self.passing.total + self.update
        return max(self.passing.total, self.gradients + self.update)

    @property
    def training(self) -> float:
        return self.context + self.kept + self.state + self.step

    @property
    def total(self) -> float:
        return max(self.training, self.startup)


def estimate(config: Config, skeleton: Skeleton, machine: Machine, found: Passing) -> Estimate:
    """A run of `config` on `machine`, whose passes take what was `found`."""
    sharded = config.sharding.name == "fsdp" and machine.num_processes > 1
    share = 1 / machine.num_processes if sharded else 1.0
    weights = skeleton.weights()
    whole, trained = sum(weights.values()), skeleton.trained()
    gradients = float(sum(parameter.nbytes for parameter in trained))
    state = _state(skeleton, config.optimizer) * share
    offload = config.optimizer.offload or config.sharding.cpu_offload
    outside = offload or config.optimizer.name.startswith("paged_")
    context = CONTEXT if machine.device.type == "cuda" else 0
    return Estimate(
        weights=weights,
        kept=_shared(skeleton, whole, share, offloaded=config.sharding.cpu_offload) if sharded else whole,
        gradients=0.0 if config.optimizer.step_in_backward else gradients * share,
        state=0.0 if outside else state,
        update=0.0 if offload else _update(trained, config.optimizer) * share,
        passing=Passing(found.activations, found.gradients * share),
        updates_in_backward=config.optimizer.step_in_backward,
        context=context,
        startup=context + whole + found.activations + gradients if sharded else 0.0,
        host=state if outside else 0.0,
    )


def _shared(skeleton: Skeleton, whole: int, share: float, *, offloaded: bool) -> float:
    """Bytes of weights under FSDP: a share of all, the rest of the model around its blocks, which stays gathered in a
    pass, and two blocks, of which one is gathered while the other is computed.
    """
    blocks = [skeleton.bytes_of(block) for block in sharding.blocks(base_of(skeleton.model))]
    around = whole - sum(blocks)
    return around + 2 * max(blocks, default=0) + (0.0 if offloaded else share * whole)


def _state(skeleton: Skeleton, optimizer: OptimizerConfig) -> float:
    """Bytes of the optimizer's state after the first step."""
    hidden = hidden_matrices(skeleton.model) if optimizer.name == "muon" else set()
    total = 0.0
    for name, parameter in skeleton.model.named_parameters():
        if not parameter.requires_grad:
            continue
        each = _state_bytes(parameter, optimizer)
        if optimizer.name.endswith("8bit") and parameter.numel() >= SMALLEST_IN_8_BIT:
            total += EIGHT_BIT * parameter.numel()
        else:
            total += (1 if name in hidden else 2) * each * parameter.numel()
    return total


def _state_bytes(parameter: nn.Parameter, optimizer: OptimizerConfig) -> int:
    """Bytes of one value of a state: it has the type in which the weight is updated."""
    rounded = parameter.dtype is torch.bfloat16 and optimizer.rounding == "stochastic"
    return 4 if rounded else parameter.element_size()


def _update(trained: list[nn.Parameter], optimizer: OptimizerConfig) -> float:
    """Bytes of copies in a step: of a bf16 weight, it and its gradient in fp32; Muon's products of a matrix."""
    largest = 0.0
    for parameter in trained:
        count = parameter.numel()
        if parameter.dtype is torch.bfloat16 and optimizer.rounding == "stochastic":
            largest = max(largest, 8 * count + min(NOISE, 4 * count))
        if optimizer.name == "muon" and parameter.dim() == 2:
            largest = max(largest, 12 * count)
    return largest


@dataclass
class Plan:
    """Estimates of a config and of its variants. Equal models and equal passes are computed once."""

    architecture: Any
    batches_of: Callable[[Config], Batches]
    """The batches of a config, whose image size may have changed."""
    machine: Machine | None = None
    """None: a GPU with bfloat16, in the config's precision."""
    skeletons: dict[str, Skeleton] = field(default_factory=dict)
    passes: dict[str, Passing] = field(default_factory=dict)

    def of(self, config: Config, rows: int | None = None, processes: int = 1) -> Estimate:
        """With micro-batches of `rows` rows. Raises ConfigError as the run itself would."""
        machine = self.machine or Machine.of(config, processes)
        found = self._passing(config, rows or config.trainer.batch_size, machine)
        return estimate(config, self._skeleton(config, machine), machine, found)

    def _skeleton(self, config: Config, machine: Machine) -> Skeleton:
        key = repr(_of_model(config))
        if key not in self.skeletons:
            self.skeletons[key] = build(config, self.architecture, machine)
        return self.skeletons[key]

    def _passing(self, config: Config, rows: int, machine: Machine) -> Passing:
        trainer = config.trainer
        key = repr(
            (
                *(_of_model(config), config.model.image, trainer.gradient_checkpointing, rows),
                *(keeps_gradients(config, machine), config.optimizer.step_in_backward),
            )
        )
        if key not in self.passes:
            self.passes[key] = passing(config, self.architecture, machine, self.batches_of(config), rows)
        return self.passes[key]

    def largest(self, config: Config, limit: float, processes: int = 1) -> int:
        """The most rows of a micro-batch that fit into `limit` bytes: each row adds the same. 0: not even one fits."""
        more = max(2, config.trainer.batch_size)
        few, many = (self.of(config, rows, processes) for rows in (1, more))
        if few.total > limit:
            return 0
        each = (many.passing.activations - few.passing.activations) / (more - 1)
        room = min(limit - few.context - few.kept - few.state - few.passing.total, limit - few.startup)
        return 1 + int((room - few.update * few.updates_in_backward) / each)


def _of_model(config: Config) -> tuple[Any, ...]:
    """The settings that a model follows from."""
    model = dataclasses.replace(config.model, image=ImageConfig())
    return model, config.adapter, config.quantization, config.trainer.precision
