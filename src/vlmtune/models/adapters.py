"""Put a PEFT adapter on the chosen parts. The only module that imports peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmtune.config import Config
from vlmtune.errors import CheckpointError, ConfigError, nearest
from vlmtune.models.lora import in_one_step
from vlmtune.models.parts import Parts, modules_in
from vlmtune.signatures import adapter_fields


def adapt(model: Any, config: Config, parts: Parts, *, total_steps: int) -> Any:
    """Make trainable what the config asks for: an adapter over a frozen base, or the model minus `model.freeze`.

    Raises ConfigError: a target that matches nothing in the parts, or a layer or value that PEFT can't take.
    """
    if not config.uses_adapter:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parts.of(name) not in config.model.freeze)
        return model
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    fields = {k: v for k, v in config.adapter.items() if k not in ("method", "parts")}
    if "target_modules" in adapter_fields()[config.adapter["method"]] and fields.get("target_modules") is None:
        fields["target_modules"] = "all-linear"  # PEFT's own default knows no parts
    for key in ("target_modules", "feedforward_modules"):
        if fields.get(key) is not None:
            fields[key] = expand_targets(model, parts, fields[key], config.adapter["parts"], key)
    if config.adapter["method"] == "adalora":
        fields.setdefault("total_step", total_steps)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if fields.get("use_dora") and config.quantization["method"] == "bitsandbytes_8bit" and on_cpu:
        raise ConfigError(
            "adapter.use_dora: PEFT and bitsandbytes lose the scales of int8 weights after the first pass on a CPU; "
            "use quantization=nf4 or none, or adapter=lora"
        )
    model.requires_grad_(False)
    try:
        peft_config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.adapter["method"].upper())](**fields)
        adapted = get_peft_model(model, peft_config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"adapter={config.adapter['method']}: PEFT refuses it here: {error}") from error
    return with_lora_in_one_step(adapted)


def with_lora_in_one_step(model: Any) -> Any:
    """`model`, whose plain LoRA layers compute as `models.lora` does on a CPU, wherever that is the same."""
    if next(model.parameters()).device.type != "cpu":
        return model
    from peft.tuners.lora.layer import Linear

    class OneStep(Linear):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = None if args or kwargs else in_one_step(self, x)
            return super().forward(x, *args, **kwargs) if out is None else out

    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = OneStep
    return model


def set_total_steps(model: Any, config: Config, steps: int) -> None:
    """Tell AdaLoRA how long the run is, where `adapter.total_step` doesn't: its ranks shrink by that."""
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None and config.adapter.get("total_step") is None:
        allocator.set_total_step(steps)


def expand_targets(model: nn.Module, parts: Parts, wanted: Any, scope: list[str], key: str) -> list[str]:
    """Full names of the modules that `wanted` means inside the parts `scope`.

    `wanted`: `all-linear` (but for the output embedding), a list of module name endings (`q_proj`), or a regular
    expression of full names.
    """
    linear = {n for n, m in modules_in(model, parts, scope) if isinstance(m, nn.Linear) and n != parts.head}
    if wanted == "all-linear":
        return sorted(linear)
    everything = [name for name, _ in modules_in(model, parts, scope)]
    if isinstance(wanted, str):
        found = [name for name in everything if re.fullmatch(wanted, name)]
        unmatched = [] if found else [wanted]
    else:
        hits = {target: [n for n in everything if n == target or n.endswith("." + target)] for target in wanted}
        found = sorted({name for names in hits.values() for name in names})
        unmatched = [target for target, names in hits.items() if not names]
    if unmatched:
        endings = {name.rsplit(".", 1)[-1] for name in linear}
        problems = [
            f"adapter.{key}: {t} matches nothing in {'+'.join(scope)}; {nearest(t, endings)}" for t in unmatched
        ]
        raise ConfigError(problems)
    return found


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter saved in `folder`.

    Raises CheckpointError where a weight of the adapter finds no place in the model or the other way round: PEFT would
    only warn, and leave a random adapter.
    """
    import warnings

    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    _refuse_code(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            adapted = PeftModel.from_pretrained(model, folder)
        except (Warning, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{folder}: the adapter does not fit this model: {reason}") from error
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        homeless = sorted(set(file.keys()) - set(get_peft_model_state_dict(adapted)))
    if homeless:
        raise CheckpointError(f"{folder}: the adapter does not fit this model: no place for {', '.join(homeless[:3])}")
    return with_lora_in_one_step(adapted)


def _refuse_code(folder: Path) -> None:
    """PEFT would unpickle adapter_model.bin, and import the package that `megatron_core` names."""
    if not (folder / "adapter_model.safetensors").is_file():
        found = "; it has adapter_model.bin, which may carry code: save it again as safetensors"
        raise CheckpointError(
            f"{folder}: has no adapter_model.safetensors{found * (folder / 'adapter_model.bin').exists()}"
        )
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("megatron_core")
    if named not in (None, "megatron.core"):
        raise CheckpointError(f"{folder}/adapter_config.json: megatron_core={named} would run code; remove that line")


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that PEFT saves of an adapter; empty for a model without one."""
    from peft import PeftModel, get_peft_model_state_dict

    return get_peft_model_state_dict(model) if isinstance(model, PeftModel) else {}


def saved_name(name: str) -> str:
    """The key under which PEFT saves the parameter `name` of a live model: without the adapter's name, and DoRA's
    magnitudes as in the days when they were no modules."""
    plain = name.replace(".modules_to_save", "").replace(".default", "")
    return plain.removesuffix(".weight") if plain.endswith(".lora_magnitude_vector.weight") else plain


def after_step(model: Any, step: int) -> None:
    """Let an adapter that changes its shape while training do so (AdaLoRA prunes ranks). `step` counts from 1."""
    update = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    if update is not None:
        update(step)


def penalty(model: Any) -> torch.Tensor | None:
    """AdaLoRA's orthogonality term, weighted, which PEFT adds only to losses that the model computes itself.

    Mean over all A and B of the Frobenius norm of A A^T - I, B^T B - I. Source: Zhang et al. 2023, arXiv:2303.10512.
    """
    peft_config = getattr(model, "peft_config", {}).get("default")
    weight = getattr(peft_config, "orth_reg_weight", None)
    if not weight:
        return None
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
    return weight * torch.stack(terms).mean()
