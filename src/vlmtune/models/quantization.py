"""Quantize the chosen parts while loading; `quantization/*.yaml` holds transformers' own fields."""

from __future__ import annotations

from typing import Any

import torch

from vlmtune.errors import ConfigError
from vlmtune.models.parts import Parts


def quantization_config(quantization: dict[str, Any], parts: Parts, compute_dtype: torch.dtype) -> Any:
    """transformers' config object for `quantization`, which leaves modules outside `quantization.parts` as they are.

    The skip list replaces transformers' own (which spares the head alone and quantizes vision tower and projector).
    Raises ConfigError where the class refuses a value.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    cls = AUTO_QUANTIZATION_CONFIG_MAPPING[quantization["method"]]
    fields = {k: v for k, v in quantization.items() if k not in ("method", "parts")}
    if fields.get("bnb_4bit_compute_dtype", "") is None:
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    if "bnb_4bit_quant_storage" in fields and fields["bnb_4bit_quant_storage"] is None:
        del fields["bnb_4bit_quant_storage"]
    fields.setdefault("llm_int8_skip_modules", parts.outside(quantization["parts"]))
    try:
        return cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"quantization: {error}") from error


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    The packed form has no backward pass: gradients after an evaluation would be wrong without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantized_bits(model: Any) -> int | None:
    """4 or 8 where weights of `model` are stored so, by this run or by its checkpoint; else None."""
    stored = getattr(model.config, "quantization_config", None)
    return stored_bits(stored if isinstance(stored, dict) else stored.to_dict()) if stored is not None else None


def stored_bits(stored: dict[str, Any]) -> int:
    """Bits of a weight under a checkpoint's `quantization_config`; 8 where it doesn't say."""
    if stored.get("load_in_4bit") or stored.get("_load_in_4bit"):
        return 4
    return int(stored.get("bits") or stored.get("nbits") or 8)
