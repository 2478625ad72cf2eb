"""Optimizer and schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmtune.config import OptimizerConfig, TrainerConfig
from vlmtune.errors import ConfigError
from vlmtune.models.parts import Parts


def build_optimizer(
    model: nn.Module, parts: Parts, trainer: TrainerConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    """An optimizer over every trainable weight, grouped by learning rate and by whether it decays.

    Raises ConfigError where nothing trains, or where a learning rate is given for a part that has no trainable weight.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parts.of(name), parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise ConfigError("nothing is trainable: model.freeze covers the whole model")
    unused = set(trainer.learning_rate_of) - {part for part, _ in groups}
    if unused:
        raise ConfigError(
            [f"trainer.learning_rate_of.{part}: no weight of this part trains" for part in sorted(unused)]
        )
    specs = [
        {
            "params": parameters,
            "lr": trainer.learning_rate_of.get(part, trainer.learning_rate),
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
    ]
    options: dict[str, Any] = {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    if optimizer.name == "adamw":
        fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for g in groups.values() for p in g)
        return torch.optim.AdamW(specs, fused=fused, **options)
    import bitsandbytes

    cls = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[optimizer.name]
    return cls(specs, **options)


def build_scheduler(optimizer: torch.optim.Optimizer, trainer: TrainerConfig, total_steps: int) -> Any:
    """Learning rate per optimizer step: linear warmup, then the chosen shape down to 0 at `total_steps`."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if trainer.scheduler.name == "constant" else trainer.scheduler.name
    warmup = round(trainer.scheduler.warmup_fraction * total_steps)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch warns where a resumed run catches up
    return scheduler
