"""Arguments of `from_pretrained` for a model path: a hub id has a revision, a folder has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.config.schema import ModelConfig


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that apply to a hub id but not to a local folder."""
    return {"trust_remote_code": config.trust_remote_code, **remote(config)}


def remote(config: ModelConfig) -> dict[str, Any]:
    """The revision, for a hub id."""
    return {} if Path(str(config.path)).is_dir() else {"revision": config.revision or "main"}


def is_original_internvl2(config: ModelConfig) -> bool:
    """Whether a checkpoint has InternVL2's own layout, which is opened without running its code."""
    from transformers.configuration_utils import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(config.path, **remote(config))
    return bool(found.get("model_type") == "internvl_chat")
