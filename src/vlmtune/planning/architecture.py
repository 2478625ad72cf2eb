"""The architecture of a model without its weights: from `model.architecture`, or the config.json of a local folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ConfigError, ModelError

EXACT = 12
"""Models with at most this many language layers are built whole."""
SHALLOW = (4, 8)
"""Numbers of language layers from which deeper ones are extrapolated: all layers are alike, or repeat after 4 or so."""


def architecture_of(model: ModelConfig, processor: Any = None) -> Any:
    """transformers' config object. `processor`: that of a local folder, where there is one.

    Raises ConfigError where the figures are missing or are not those of a family, ModelError for a damaged folder.
    """
    if processor is not None:
        from vlmtune.models.load import class_and_config

        return class_and_config(model, processor)[1]
    figures = dict(model.architecture)
    if not figures:
        raise ConfigError(
            f"model.architecture: missing, and model.path={model.path} is no local folder; choose a model by name "
            "(model=qwen2vl_7b), or give a folder with its config.json and processor"
        )
    return _config_of(figures)


def _config_of(figures: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = figures.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.architecture.model_type={kind}: the installed transformers has no such model")
    plain = AutoConfig.for_model(kind)
    problems = [*unknown(figures, plain, "model.architecture.")]
    if problems:
        raise ConfigError(problems)
    try:
        return AutoConfig.for_model(kind, **figures)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.architecture: {kind} refuses these figures: {error}") from error


def unknown(figures: dict[str, Any], plain: Any, prefix: str) -> list[str]:
    """Problems of keys that the family's config class, and those of its parts, do not have: transformers would keep
    them and use its defaults in their place.
    """
    problems = []
    for key, value in figures.items():
        if key == "model_type":
            continue
        part: Any = getattr(plain, key, None)
        if isinstance(value, dict) and key in getattr(plain, "sub_configs", {}):
            own = value.get("model_type", part.model_type)
            problems += unknown(value, part if own == part.model_type else _plain(own, prefix + key), f"{prefix}{key}.")
        elif not hasattr(plain, key):
            problems.append(f"{prefix}{key}: {type(plain).__name__} has no such figure")
    return problems


def _plain(kind: str, key: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"{key}.model_type={kind}: the installed transformers has no such model")
    return AutoConfig.for_model(kind)


def layers_of(architecture: Any) -> int:
    """The number of language layers."""
    return int(architecture.get_text_config().num_hidden_layers)


def shallow(architecture: Any, layers: int) -> Any:
    """The same architecture with its first `layers` language layers."""
    changed = copy.deepcopy(architecture)
    text = changed.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return changed


def local_folder(model: ModelConfig) -> Path | None:
    """The folder that `model.path` names, if it is one. Raises ModelError for an empty path."""
    if model.path is None:
        raise ModelError("model.path: missing")
    folder = Path(model.path).expanduser()
    return folder if folder.is_dir() else None
