"""The base model of a run, as it was before any quantization, with the adapters of one or several runs on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmtune.config.schema import Config, MethodConfig, ModelConfig
from vlmtune.errors import ConfigError
from vlmtune.export.sources import Source
from vlmtune.launch.session import DTYPES

if TYPE_CHECKING:
    from vlmtune.launch.engine import Engine


@dataclass
class Opened:
    """A base model with adapters."""

    model: Any
    processor: Any
    names: list[str]
    """PEFT's names of the adapters, in the order of the runs."""
    types: dict[str, torch.dtype]
    """Of each weight of the base model."""


def unquantized(config: Config, run: Path) -> Config:
    """`config` with the base model of `run` as it is stored, and written as its own family's code reads it.

    Raises ModelError where the model can't be found.
    """
    from vlmtune.models.explain import explained
    from vlmtune.prompt.hub import is_original_internvl2

    plain = copy.deepcopy(config)
    plain.quantization = MethodConfig()
    if plain.model.fresh is not None:
        plain.model = dataclasses.replace(plain.model, path=str(run / "base"), fresh=None)
        return plain
    with explained(plain.model):
        if is_original_internvl2(plain.model):
            plain.model.save_layout = "original"
    return plain


def dtype_of(name: str, config: ModelConfig) -> torch.dtype:
    """The type for the key `dtype`; for `auto` the one that the base model is stored in.

    Raises ModelError where the model can't be found.
    """
    from transformers.configuration_utils import PreTrainedConfig

    from vlmtune.models.explain import explained
    from vlmtune.prompt.hub import remote

    if name != "auto":
        return DTYPES[name]
    with explained(config):
        values, _ = PreTrainedConfig.get_config_dict(config.path, **remote(config))
    places = [values, values.get("text_config") or {}, values.get("llm_config") or {}]
    stored = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    return next((known[each] for each in stored if each in known), torch.float32)


def open_all(config: Config, sources: Sequence[Source], dtype: torch.dtype, engine: Engine) -> Opened:
    """The base model in `dtype` with the adapters of all runs; that of the first is active.

    Raises ConfigError where it is another base than that of the runs, or the adapter can't be merged into it.
    """
    from vlmtune.models import merging
    from vlmtune.models.saved_adapter import load_adapter, load_beside

    base, processor = open_model(config, dtype, engine)
    check_base(base, config, sources)
    types = {name: parameter.dtype for name, parameter in base.named_parameters()}
    model = load_adapter(base, sources[0].model)
    names = ["default", *(f"adapter_{number}" for number in range(1, len(sources)))]
    for name, source in zip(names[1:], sources[1:], strict=True):
        load_beside(model, source.model, name)
    if reason := merging.refusal(model, config, rounded=True):
        raise ConfigError(f"{sources[0].run}: its adapter can't be merged: {reason}{_way(reason)}")
    return Opened(model.requires_grad_(False).eval(), processor, names, types)


def _way(reason: str) -> str:
    return "; set model.path to the same model without quantization" if "quantized" in reason else ""


def check_base(model: Any, config: Config, sources: Sequence[Source]) -> None:
    """Raise ConfigError where `model` is not the base that the runs were trained over."""
    from vlmtune.models.parts import base_files

    own = base_files(model, str(config.model.path))
    for source in sources:
        if source.noted and source.base != own:
            raise ConfigError(
                f"{source.run}: was trained over another base model ({source.base}) than model.path="
                f"{config.model.path} ({own}); set model.path and model.revision to those of that run"
            )


def open_model(config: Config, dtype: torch.dtype, engine: Engine, folder: Path | None = None) -> tuple[Any, Any]:
    """The model of `config`, or the one in `folder`, and its processor; without faster forms of its modules."""
    from vlmtune.models import attention, load

    given = dataclasses.replace(attention.usable(config.model, dtype), rewrites="off")
    if folder is not None:
        given = dataclasses.replace(given, path=str(folder), revision=None)
    types = {"dtype": dtype, "compute_dtype": dtype}
    model, processor = load.load(given, config.quantization, device=engine.device, **types)
    return model.requires_grad_(False).eval(), processor
