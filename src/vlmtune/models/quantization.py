"""Quantize the chosen parts while loading; `quantization/*.yaml` holds transformers' own fields."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import MethodConfig
from vlmtune.errors import ConfigError, ModelError, nearest
from vlmtune.packages import import_bitsandbytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlmtune.models.parts import Parts

SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules", "linear_weights_not_to_quantize")
"""What transformers' classes call the list of modules that stay whole."""


def quantization_config(quantization: MethodConfig, skip: list[str], compute_dtype: torch.dtype) -> Any:
    """transformers' config object for `quantization`, which leaves the modules `skip` as they are.

    The list replaces transformers' own (which spares the head alone and quantizes vision tower and projector); names
    that the user gives are added to it. Raises ConfigError where the class refuses a value, or has no such list.
    """
    method, fields = str(quantization.method), dict(quantization.fields)
    cls = _config_class(method, fields)
    if fields.get("bnb_4bit_compute_dtype", "") is None:
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    if "bnb_4bit_quant_storage" in fields and fields["bnb_4bit_quant_storage"] is None:
        del fields["bnb_4bit_quant_storage"]
    key = next((name for name in SKIP_FIELDS if name in inspect.signature(cls).parameters), None)
    if key is None:
        raise ConfigError(f"quantization.method={method}: can't be limited to quantization.parts; use nf4, fp4 or int8")
    fields[key] = [*(fields.get(key) or []), *skip]
    try:
        return cls(**fields)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"quantization: {error}") from error


def _config_class(method: str, fields: dict[str, Any]) -> Any:
    """transformers' class for `method`. Raises ConfigError where the installed version lacks it or one of `fields`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    installed = f"the installed transformers ({version('transformers')})"
    cls = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if cls is None:
        raise ConfigError(f"quantization.method={method}: {installed} has no such method")
    if unknown := sorted(fields.keys() - inspect.signature(cls).parameters.keys()):
        raise ConfigError([f"quantization.{key}: {method} of {installed} has no such field" for key in unknown])
    return cls


def check_method(config: Any, method: str, device: torch.device) -> None:
    """Raise ConfigError where `method` can't quantize while loading on this machine, or nothing can train over it."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    cls = AUTO_QUANTIZER_MAPPING[method]
    if cls.requires_calibration:
        raise ConfigError(
            f"quantization.method={method}: can't quantize while loading; give a checkpoint that is stored so in "
            "model.path, and quantization=none"
        )
    try:
        quantizer = cls(config, pre_quantized=False)
        quantizer.validate_environment(device_map={"": device})
    except (ImportError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"quantization.method={method}: {error}") from error
    if not quantizer.is_trainable:
        raise ConfigError(f"quantization.method={method}: adapters can't be trained on it; use nf4, fp4 or int8")


def whole_modules(model: Any, parts: Parts, quantization: MethodConfig) -> list[str]:
    """Names of the outermost modules of `model` that hold no layer of `quantization.parts`: these stay whole.

    transformers takes a name for everything under it, so a module around a wanted one can't be named itself. The
    output embedding counts as `head`, tied to the input's or not.
    Raises ConfigError where a wanted part has no layer that can be quantized, or a skipped name means none.
    """
    wanted = quantization.parts
    layers = dict(linear_layers(model, parts))
    lost = [part for part in wanted if part not in layers.values()]
    if "head" in wanted and parts.head and parts.of(parts.head) != "head":
        raise ConfigError("quantization.parts: head is tied to the input embedding in this model; leave it out")
    if lost:
        raise ConfigError([f"quantization.parts: this model has no linear layer in {part}" for part in lost])
    inside = [layer for layer, part in layers.items() if part in wanted]
    around = {"", *(".".join(layer.split(".")[:n]) for layer in inside for n in range(1, layer.count(".") + 2))}
    names = [name for name, _ in model.named_modules() if name]
    outside = [name for name in names if name not in around and name.rpartition(".")[0] in around]
    return outside + skipped_by_user(names, quantization)


def skipped_by_user(names: list[str], quantization: MethodConfig) -> list[str]:
    """Full names of the modules that the user has stay whole, by endings as everywhere or by transformers' own rule.

    Raises ConfigError where one means none of `names`.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    found: list[str] = []
    for key in SKIP_FIELDS:
        for wanted in quantization.fields.get(key) or []:
            hits = [n for n in names if n.endswith(f".{wanted}") or not should_convert_module(n, [wanted])]
            if not hits:
                endings = {name.rsplit(".", 1)[-1] for name in names}
                raise ConfigError(f"quantization.{key}: {wanted} matches nothing; {nearest(str(wanted), endings)}")
            found += hits
    return found


def linear_layers(model: nn.Module, parts: Parts) -> Iterator[tuple[str, str]]:
    """(name, part) of every linear layer; those of the output embedding count as `head`."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_head = parts.head and f"{name}.".startswith(f"{parts.head}.")
            yield name, "head" if is_head else parts.of(name)


def check_stored(model: nn.Module) -> None:
    """Raise ModelError where a checkpoint says that bitsandbytes quantized it, and its weights are whole."""
    from vlmtune.models.parts import is_quantized

    replaced = any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules())
    if replaced and not any(is_quantized(parameter) for parameter in model.parameters()):
        raise ModelError(
            "config.json says that the weights are quantized, but they are not; remove quantization_config from it, "
            "and quantize while loading: quantization=nf4"
        )


def check_quantized(model: nn.Module, parts: Parts, wanted: list[str]) -> None:
    """Raise ModelError where a wanted part has ended up without a single quantized layer."""
    from vlmtune.models.parts import is_quantized

    done = {parts.of(name) for name, parameter in model.named_parameters() if is_quantized(parameter)}
    whole = [part for part in wanted if part not in done]
    if whole:
        raise ModelError(f"quantization.parts: no layer of {', '.join(whole)} has been quantized")


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    The packed form has no backward pass: gradients after an evaluation would be wrong without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def use_stored(architecture: Any, quantization: MethodConfig, compute_dtype: torch.dtype) -> bool:
    """True for a checkpoint that is stored quantized; 4-bit weights of bitsandbytes then compute in `compute_dtype`.

    Raises ConfigError where the run would quantize it once more.
    """
    from transformers.quantizers import AutoHfQuantizer

    stored = getattr(architecture, "quantization_config", None)
    if not stored:
        return False
    if not isinstance(stored, dict) or not AutoHfQuantizer.supports_quant_method(stored):
        raise ModelError(f"config.json: this transformers can't read its quantization_config: {stored}")
    if quantization.method is not None:
        raise ConfigError(
            f"quantization: the checkpoint is stored in {stored_bits(stored)} bits already; use quantization=none, "
            "which keeps it as it is"
        )
    if str(stored.get("quant_method", "bitsandbytes")).startswith("bitsandbytes"):
        import_bitsandbytes(f"model.path: stored in {stored_bits(stored)} bits")
    if stored.get("bnb_4bit_compute_dtype") is not None:
        stored["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    return True


def quantized_bits(model: Any) -> int | None:
    """4 or 8 where weights of `model` are stored so, by this run or by its checkpoint; else None."""
    stored = getattr(model.config, "quantization_config", None)
    return stored_bits(stored if isinstance(stored, dict) else stored.to_dict()) if stored is not None else None


def stored_bits(stored: dict[str, Any]) -> int:
    """Bits of a weight under a checkpoint's `quantization_config`; 8 where it doesn't say."""
    if stored.get("load_in_4bit") or stored.get("_load_in_4bit"):
        return 4
    return int(stored.get("bits") or stored.get("nbits") or 8)
