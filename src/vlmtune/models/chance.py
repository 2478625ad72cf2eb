"""What a model leaves to chance while it trains: dropout in all its forms, noise, and statistics of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

OTHER_NAMES = ("p", "config")
"""Attributes that hold a rate without saying so: `nn.Dropout`'s, and that of Idefics' gated layers."""


def varies(module: nn.Module) -> bool:
    """Whether a module in training mode depends on chance or on the rest of the batch."""
    return bool(_rates(module)) or isinstance(module, _BatchNorm)


@contextmanager
def without_chance(model: nn.Module) -> Iterator[None]:
    """Inside the context, `model` computes as in training, gradient checkpointing included, but without chance.

    Rates of dropout and noise are zero, in modules and in the configs that some read them from. Batch norm uses its
    running statistics, and adapters' layers, some of which sample while they train, are in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    owners: dict[int, Any] = {id(module): module for module, _ in modes}
    owners |= {
        id(config): config for module, _ in modes if hasattr(config := getattr(module, "config", None), "to_dict")
    }
    rates = [(owner, found) for owner in owners.values() if (found := _rates(owner))]
    try:
        model.train()
        for module, _ in modes:
            module.training = not (isinstance(module, _BatchNorm) or type(module).__module__.startswith("peft.tuners"))
        for owner, found in rates:
            vars(owner).update(dict.fromkeys(found, 0.0))
        yield
    finally:
        for owner, found in rates:
            vars(owner).update(found)
        for module, mode in modes:
            module.training = mode


def _rates(owner: Any) -> dict[str, float]:
    """The attributes of a module or a config that are rates of chance, above zero."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and (name in OTHER_NAMES or "drop" in name or "jitter" in name)
    }
