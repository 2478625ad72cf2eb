"""A model without weights, as a run makes it: its types, quantized layers, adapter and checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.config.schema import Config
from vlmtune.launch import session
from vlmtune.models import adapters, gradient_checkpointing, rewrites
from vlmtune.models.parts import Parts, find_parts
from vlmtune.planning.packed import Packed, adapt_packed, pack


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. As much of an Engine as the number types of a run need."""

    device: torch.device
    mixed_precision: str
    num_processes: int = 1

    @classmethod
    def of(cls, config: Config, processes: int = 1) -> Machine:
        """GPUs that have bfloat16."""
        precision = {"auto": "bf16", "fp32": "no"}.get(config.trainer.precision, config.trainer.precision)
        return cls(torch.device("cuda"), precision, processes)

    @property
    def autocast(self) -> torch.dtype | None:
        return session.DTYPES.get(self.mixed_precision)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device."""

    model: Any
    parts: Parts

    def weights(self) -> dict[tuple[str, str], int]:
        """Bytes of the frozen and fully trained weights by part and type; what an adapter adds is `adapter`."""
        found: dict[tuple[str, str], int] = {}
        for name, kind, size in self._tensors():
            part = "adapter" if _is_added(name) else self.parts.of(name)
            found[part, kind] = found.get((part, kind), 0) + size
        for _, buffer in self.model.named_buffers():
            found["buffers", "fp32"] = found.get(("buffers", "fp32"), 0) + buffer.nbytes
        return found

    def _tensors(self) -> Iterator[tuple[str, str, int]]:
        """Name, type and bytes of each weight, as it is stored."""
        packed = {module.weight: module for module in self.model.modules() if isinstance(module, Packed)}
        for name, parameter in self.model.named_parameters():
            if parameter in packed:
                layer = packed[parameter]
                yield name, f"{layer.bits} bits", layer.stored
            else:
                yield name, NAMES.get(parameter.dtype, str(parameter.dtype)), parameter.nbytes

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a module's weights as they are stored."""
        layers = {each.weight: each for each in module.modules() if isinstance(each, Packed)}
        return sum(layers[p].stored if p in layers else p.nbytes for p in module.parameters())

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def build(config: Config, architecture: Any, machine: Machine) -> Skeleton:
    """The model of a run on the meta device, in training mode. Raises ConfigError as the run itself does."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    session.quiet_libraries()
    planned = _planned(config, machine)
    dtypes = session.dtypes(planned, machine)  # type: ignore[arg-type]
    architecture = copy.deepcopy(architecture)
    attention = {"attn_implementation": "sdpa"} if "flash" in config.model.attention else {}  # of the same memory
    if getattr(architecture, "quantization_config", None) is not None:
        del architecture.quantization_config
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(architecture, dtype=dtypes["dtype"], **attention)
        model.tie_weights()
    parts = find_parts(model)
    rewrites.rewrite(model, planned.model.rewrites, torch.device("cuda"), dtypes["compute_dtype"])
    pack(model, parts, planned.quantization, dtypes["compute_dtype"])
    model = adapters.adapt(model, planned, parts)
    adapt_packed(model)
    gradient_checkpointing.prepare(model, planned.trainer)
    return Skeleton(model.train(), parts)


def _planned(config: Config, machine: Machine) -> Config:
    """A copy of the config whose settings for a device no longer depend on the device that they are computed on."""
    planned = copy.deepcopy(config)
    if planned.model.rewrites == "auto" and machine.device.type == "cpu":
        planned.model.rewrites = "on"
    if isinstance(planned.adapter.fields.get("init_lora_weights"), str):
        planned.adapter.fields["init_lora_weights"] = True  # how it starts takes no memory
    return planned


def _is_added(name: str) -> bool:
    """Whether a parameter of a PEFT model, by its full name, is one that the adapter added."""
    return ".default" in name
