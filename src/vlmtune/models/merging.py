"""Adds an adapter to its base model's weights, in memory, so that no adapter layers are computed for an answer."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import nn

from vlmtune.config.schema import Config
from vlmtune.errors import ConfigError
from vlmtune.models.quantization import quantized_bits

log = logging.getLogger("vlmtune")

METHODS = frozenset(
    (
        *("adalora", "boft", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3"),
        *("ln_tuning", "loha", "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora"),
        *("tinylora", "trainable_tokens", "unilora", "vera"),
    )
)
"""PEFT's methods whose merged weights answer as the adapter's layers do; tests compare them."""


def merged(model: Any, config: Config) -> Any:
    """`model` with its adapter merged, by `generation.merge_adapter`; the model itself where that is not possible.

    Raises ConfigError if `on` is set and it is not.
    """
    setting = config.generation.merge_adapter
    if not config.uses_adapter or setting == "off":
        return model
    reason = refusal(model, config, rounded=setting == "on")
    if reason is None:
        log.info("the adapter is merged into the weights of the base model, in memory")
        return model.merge_and_unload()
    if setting == "on":
        raise ConfigError(f"generation.merge_adapter=on: {reason}; use auto")
    log.info("the adapter is not merged: %s", reason)
    return model


def refusal(model: Any, config: Config, *, rounded: bool) -> str | None:
    """Why the adapter can't be merged; None if it can. `rounded`: also into weights in half precision."""
    if config.adapter.method not in METHODS:
        return f"{config.adapter.method} is not known to be mergeable"
    if quantized_bits(model) is not None:
        return "the weights are quantized"
    if config.adapter.fields.get("lora_bias"):
        return "PEFT merges the bias of B only into layers that have a bias"
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        if not isinstance(base := getattr(module, "base_layer", None), nn.Module):
            continue
        if getattr(base, "groups", 1) > 1:
            return f"{name} is a convolution in groups"
        for weight in base.parameters():
            if uses[id(weight)] > 1:
                return f"{name} shares its weights with another layer"
            if weight.dtype != torch.float32 and not rounded:
                return f"weights in {str(weight.dtype).removeprefix('torch.')} would be rounded"
    return None
