"""Adds adapters to their base model's weights for good: one alone, or several as one, by PEFT's own methods."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.models.peft_config import refusals


@contextmanager
def one_rounding(layers: Sequence[Any]) -> Iterator[None]:
    """Inside the context the base weights of adapter layers are in float32, and afterwards in their own type again: a
    sum in 16 bits is rounded once, and not its second term before it too.
    """
    kept = {id(p): (p, p.dtype) for layer in layers for p in layer.get_base_layer().parameters()}
    for parameter, _ in kept.values():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in kept.values():
            parameter.data = parameter.data.to(dtype)


def merge_into_base(model: Any, types: dict[str, torch.dtype]) -> Any:
    """The base model of `model` with its active adapter added to the weights, each in its type of `types`.

    Raises CheckpointError where a sum is not finite.
    """
    layers = [m for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]
    plain_layers = [layer for layer in layers if not hasattr(layer.base_layer, "base_layer")]  # not one in another
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of layers that are merged already, which these are
            for layer in plain_layers:
                with one_rounding([layer]):
                    layer.merge(safe_merge=True)
            plain = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"the adapter can't be merged: {error}; its weights are damaged or diverged") from error
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    return plain


@dataclasses.dataclass(frozen=True)
class Way:
    """How several adapters become one, in PEFT's words."""

    method: str
    density: float | None = None
    """Share of the values that a sparse method keeps."""
    majority_sign_method: str = "total"
    seed: int = 0
    """Of the values that DARE drops."""


def combine(model: Any, names: Sequence[str], weights: Sequence[float], way: Way, name: str) -> None:
    """Give `model` the adapter `name`, made of its LoRA or IA3 adapters `names`, and make it the active one.

    Raises ConfigError where PEFT refuses, or would leave out a layer that one of them adapts.
    """
    first = model.peft_config[names[0]]
    lora = first.peft_type.value == "LORA"
    options: dict[str, Any] = {"combination_type": way.method, "svd_full_matrices": False} if lora else {}
    if way.density is not None:
        options |= {"density": way.density, "majority_sign_method": way.majority_sign_method}
    with torch.random.fork_rng(devices=[]), refusals(f"{way.method} of {len(names)} adapters"), torch.no_grad():
        torch.manual_seed(way.seed)
        with _without_rslora(first):
            model.base_model.add_weighted_adapter([*names], [*weights], name, **options)
    if left_out := [place for place, module in model.named_modules() if _adapts(module, names, name)]:
        raise ConfigError(
            f"{left_out[0]}: only one of the adapters adapts it, and PEFT would leave it out of the sum; merge runs "
            "with the same adapter.target_modules"
        )
    model.set_adapter(name)


@contextmanager
def _without_rslora(config: Any) -> Iterator[None]:
    """PEFT puts alpha = r into the sum, for a scale of 1, but leaves rsLoRA on, which makes that the root of r."""
    was = getattr(config, "use_rslora", False)
    if was:
        config.use_rslora = False
    try:
        yield
    finally:
        if was:
            config.use_rslora = was


def _adapts(module: nn.Module, names: Sequence[str], name: str) -> bool:
    """Whether an adapter layer has one of the adapters `names`, but not `name`."""
    if not hasattr(module, "get_base_layer"):
        return False
    held = {key for part in module.adapter_layer_names for key in getattr(module, part, {})}  # type: ignore[union-attr]
    return bool(held & {*names}) and name not in held
