"""FSDP2: each process keeps its share of every weight, gradient and moment, and gathers a block of layers while it is
computed.

A small function around torch's `fully_shard`, the same on CPUs and GPUs. Source: Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmtune.config.schema import Config, MethodConfig, ShardingConfig
from vlmtune.config.together import NO_SHARDED_SCALER
from vlmtune.data.splits import Records
from vlmtune.errors import ConfigError
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.models import idle_tower
from vlmtune.models.parts import base_of
from vlmtune.prompt.encode import Encoder

log = logging.getLogger("vlmtune")


def is_asked(config: ShardingConfig, engine: Engine) -> bool:
    """Whether the run's weights are sharded: one process alone has nothing to share."""
    return config.name == "fsdp" and engine.num_processes > 1


def storage(config: Config, engine: Engine) -> MethodConfig:
    """How a run's weights are quantized. In 4 bits, those that will be sharded are stored as if they were of the
    compute type: integers can't be sharded.
    """
    quantization, key = config.quantization, "bnb_4bit_quant_storage"
    four = quantization.method == "bitsandbytes_4bit" and quantization.fields.get(key) is None
    if not (four and is_asked(config.sharding, engine)):
        return quantization
    dtype = str(session.DTYPES.get(engine.mixed_precision, torch.float32)).removeprefix("torch.")
    log.info("4-bit weights are stored as %s, so that they can be sharded", dtype)
    return replace(quantization, fields={**quantization.fields, key: dtype})


def shard(model: Any, config: ShardingConfig, encoder: Encoder, records: Records, engine: Engine) -> None:
    """Shard `model` in place over all processes, where the config asks for it. `records`: that it will train on.

    Each block of the language model and of the vision tower is a unit, which is gathered as a whole; the rest is one
    more, which stays gathered from a forward pass to the end of its backward pass. Raises ConfigError for what can't be
    sharded.
    """
    if not is_asked(config, engine):
        if config.name == "fsdp":
            log.info("sharding=fsdp: one process keeps all weights, as with sharding=none")
        return
    base = base_of(model)
    units = [base, *blocks(base)]
    if problems := [*_problems(model, units, engine)]:
        raise ConfigError([f"sharding=fsdp: {problem}" for problem in problems])
    on_gpu = engine.device.type == "cuda"
    mesh = init_device_mesh(engine.device.type, (engine.num_processes,))
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
    for parameter in model.parameters():
        if parameter.requires_grad:  # or a difference between the processes' new weights would stay
            torch.distributed.broadcast(parameter.data, src=0)
    for unit in reversed(units):  # the rest of the model last
        reshard = None if unit is base else config.reshard_after_forward
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload)
    idle_tower.keep_in_step(model, encoder, records, engine)
    log.info("sharding   over %d processes, in %d units", engine.num_processes, len(units))
    session.free_memory()


def blocks(base: Any) -> list[nn.Module]:
    """The blocks of a transformers model, of language model and vision tower: the layers that it can checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _problems(model: Any, units: list[nn.Module], engine: Engine) -> Iterator[str]:
    """Why a model can't be sharded. config/together.py refuses what the config alone shows."""
    base, *inner = units
    if not inner:
        yield f"transformers knows no blocks of {type(base).__name__}; use sharding=none"
    trained = [p for p in model.parameters() if p.requires_grad]
    if len(types := {str(p.dtype).removeprefix("torch.") for p in trained}) > 1:
        yield f"trained weights must have one type, and these have {' and '.join(sorted(types))}; use model.dtype=auto"
    if any(not p.is_floating_point() for p in base.parameters()):
        yield "a checkpoint that is stored quantized, as integers; open the whole one, with quantization=nf4"
    if engine.scaler is not None:
        yield NO_SHARDED_SCALER
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in base.modules()):
        yield "the averages of a batch norm would differ between processes; use sharding=none"
    owners: dict[nn.Parameter, set[int]] = {}
    for number, unit in enumerate(inner):
        for parameter in unit.parameters():
            owners.setdefault(parameter, set()).add(number)
    inside = {*base.parameters()}
    if any(len(found) > 1 for found in owners.values()) or any(p not in inside for p in trained):
        yield "a weight of this adapter belongs to several blocks or to none; use another adapter"


def refusal(config: ShardingConfig, engine: Engine) -> str | None:
    """Why features of a run's images can't be kept; None where its model is not sharded."""
    alone = "with sharding=fsdp no process runs the encoder by itself"
    return alone if is_asked(config, engine) else None


def is_sharded(model: Any) -> bool:
    return isinstance(base_of(model), FSDPModule)


@contextmanager
def gathered(model: Any, config: ShardingConfig) -> Iterator[None]:
    """While inside, every process has the whole of a sharded model and runs it by itself, without gradients.

    All processes must enter together. The device needs memory for the whole model, as the checks at a run's start do.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not base_of(model) and config.reshard_after_forward, recurse=False)
            unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a share, as a whole. All processes must call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole


def own_share(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor that this process keeps, and its number; all of it is number 0."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    return tensor.to_local(), tensor.device_mesh.get_local_rank()


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole `tensor` that belongs to the weight `like`: its share, if it has that of the
    weight. A tensor of another shape is kept as it is.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
