"""The attention that `model.attention` names: whether this machine and this model have it, and what it can compute.

Kernels of the hub are compiled code. They only run with `model.trust_remote_code`, as a model's own Python code does;
transformers would fetch one by itself if the package of `flash_attention_2` is missing, or if a checkpoint asks for it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ConfigError, ModelError

log = logging.getLogger("vlmtune")

PACKAGES = {2: "flash-attn --no-build-isolation", 4: "flash-attn-4"}
"""What pip installs for a version of flash attention; version 3 has no package on PyPI."""
SOURCE = "https://github.com/Dao-AILab/flash-attention"


def refusal(config: ModelConfig, compute_dtype: torch.dtype) -> str | None:
    """Why `model.attention` can't be used on this machine, and what to do; None if nothing speaks against it."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.utils import is_kernels_available

    if "/" in config.attention:
        return None if is_kernels_available() else "kernels of the hub need the package kernels: pip install kernels"
    found = re.fullmatch(r"flash_attention_(\d+)", config.attention)
    if found is None:
        return None
    if compute_dtype == torch.float32:
        return "only computes in bfloat16 and float16; set trainer.precision=bf16 or fp16, on a device that supports it"
    version = int(found[1])
    known = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(version)
    if known is None:
        return "the installed transformers does not have it; use auto"
    if known["general_availability_check"]():
        return None
    if not known["pkg_availability_check"]():
        how = f"pip install {PACKAGES[version]}" if version in PACKAGES else f"install it from {SOURCE}"
        return f"needs a package that is not installed: {how}; or use auto"
    return "its package does not support this device, or is too old; use auto"


def usable(config: ModelConfig, compute_dtype: torch.dtype) -> ModelConfig:
    """`config`, with `attention=auto` if this machine lacks the attention of the machine that wrote it; logged."""
    if reason := refusal(config, compute_dtype):
        log.info("model.attention=%s is not used here: %s", config.attention, reason)
        return dataclasses.replace(config, attention="auto")
    return config


def check(config: ModelConfig, architecture: Any, compute_dtype: torch.dtype) -> None:
    """Raise ConfigError if the machine lacks the attention that is asked for, ModelError if the checkpoint's config
    (`architecture`) asks for a kernel of the hub by itself.
    """
    if reason := refusal(config, compute_dtype):
        raise ConfigError(f"model.attention={config.attention}: {reason}")
    own = str(architecture._attn_implementation)
    if config.attention == "auto" and "/" in own and not config.trust_remote_code:
        raise ModelError(
            f"{config.path}: its config.json asks for the attention {own}, which is compiled code from the hub; set "
            "model.attention=sdpa"
        )


def options(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    if config.attention == "auto":
        return {}
    return {"attn_implementation": config.attention, "allow_all_kernels": config.trust_remote_code}


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Name the key if a model does not support the attention that is asked for."""
    try:
        yield
    except (ValueError, ImportError) as error:
        first = str(error).split(". ")[0].splitlines()[0].rstrip(".")
        if config.attention == "auto" or not ("ttention" in first or "/" in config.attention):
            raise
        raise ConfigError(f"model.attention={config.attention}: {first}; use auto") from error


def takes_masks(decoder: Any) -> bool:
    """False if the attention of `decoder` only knows padding. Given a mask [B, 1, T, T], flash attention would read it
    as a list of row lengths, and outside of its tensors.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    name = decoder.config._attn_implementation
    return ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not flash_attention_mask
