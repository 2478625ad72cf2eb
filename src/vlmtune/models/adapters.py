"""Put a PEFT adapter on the chosen parts."""

from __future__ import annotations

from typing import Any

import torch

from vlmtune.config.peft_fields import quantized_problems
from vlmtune.config.schema import Config, MethodConfig
from vlmtune.errors import ConfigError
from vlmtune.models.lora import in_one_step
from vlmtune.models.parts import Parts, check_parts
from vlmtune.models.peft_config import field_names, refusals
from vlmtune.models.peft_config import peft_config as build_config
from vlmtune.models.quantization import quantized_bits
from vlmtune.models.rewrites import LORA, Fast
from vlmtune.models.saved_adapter import check_base, check_source, source_of, start_from
from vlmtune.models.targets import ALL_LINEAR, names_as_lists, narrow
from vlmtune.packages import without_bitsandbytes


@without_bitsandbytes()
def adapt(model: Any, config: Config, parts: Parts) -> Any:
    """Make trainable what the config asks for: an adapter over a frozen base, or the model minus `model.freeze`.

    A model on the meta device, which is only planned with, gets an adapter without weights. Raises ConfigError: a
    target that matches nothing in the parts, or a layer or value that PEFT can't take.
    """
    bits = quantized_bits(model)
    if not config.uses_adapter:
        return _without_adapter(model, config, parts, bits)
    from peft import get_peft_model

    method, scope = str(config.adapter.method), config.adapter.parts
    if found := quantized_problems(config.adapter, bits):
        raise ConfigError(found)
    source = source_of(config)
    if source is not None:
        check_base(model, config, source)
    check_parts(model, parts, scope, "adapter.parts")
    device = next(model.parameters()).device.type
    on_cpu, planned = device == "cpu", device == "meta"
    if config.adapter.fields.get("use_dora") and bits == 8 and on_cpu:
        raise ConfigError(
            "adapter.use_dora: PEFT and bitsandbytes lose the scales of int8 weights after the first pass on a CPU; "
            "use quantization=nf4 or none, or adapter=lora"
        )
    fields = with_some_length(config.adapter)
    peft_config = build_config(method, with_default_targets(method, fields, model))
    narrow(peft_config, model, parts, scope)
    model.requires_grad_(False)
    with refusals(method):
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=planned)  # else PEFT leaves the meta device
    freeze_other_biases(adapted, parts, scope)
    if config.model.dtype != "bf16":
        train_in_full(adapted)
    if source is not None and not planned:
        start_from(adapted, source, parts, scope)
    check_saved(adapted)
    return with_lora_in_one_step(adapted, config.model.rewrites)


def _without_adapter(model: Any, config: Config, parts: Parts, bits: int | None) -> Any:
    """The model minus `model.freeze` trains. Raises ConfigError where that is nothing, or is stored in `bits` bits."""
    if bits is not None:
        raise ConfigError(
            f"adapter=none: the weights of {config.model.path} are stored in {bits} bits, which can't be trained "
            "themselves; add an adapter, for instance adapter=lora, or start from the whole checkpoint"
        )
    check_parts(model, parts, config.model.freeze, "model.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts.of(name) not in config.model.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model.freeze: covers the whole model, so nothing would train")
    return model


def check(config: Config) -> None:
    """Raise ConfigError where PEFT refuses the values of `adapter`, and CheckpointError where the adapter to start from
    can't be used, before a model is loaded for them.
    """
    if config.uses_adapter:
        build_config(str(config.adapter.method), with_some_length(config.adapter))
        check_source(config)


def with_some_length(adapter: MethodConfig) -> dict[str, Any]:
    """PEFT's fields, for AdaLoRA with a length of the run, which it wants before the steps are counted."""
    fields = names_as_lists(adapter.fields)
    unknown = adapter.method == "adalora" and fields.get("total_step") is None
    return {**fields, "total_step": 10**9} if unknown else fields


def with_default_targets(method: str, fields: dict[str, Any], model: Any) -> dict[str, Any]:
    """`fields` with PEFT's own targets for this kind of model where none are given.

    Raises ConfigError where PEFT has none.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    if "target_modules" not in field_names(method) or fields.get("target_modules") is not None:
        return fields
    if method == "trainable_tokens":
        embedding = model.get_input_embeddings()
        return {**fields, "target_modules": [name for name, m in model.named_modules() if m is embedding]}
    if fields.get("target_parameters"):
        return fields  # these alone
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method.upper())]
    known = getattr(tuner, "target_module_mapping", None) or {}
    default = ALL_LINEAR if method == "osf" else known.get(model.config.model_type)
    if default is None:
        raise ConfigError(
            f"adapter.target_modules: missing; PEFT has no default of {method} for {model.config.model_type}. "
            "Give all-linear, or names: [q_proj,v_proj]"
        )
    return {**fields, "target_modules": default}


def freeze_other_biases(model: Any, parts: Parts, scope: list[str]) -> None:
    """Keep `bias: all` inside the parts `scope`: PEFT has every bias of the model train.

    Raises ConfigError where no bias of the base model is left to train.
    """
    kind = getattr(model.peft_config["default"], "bias", "none")
    if kind == "none" or not isinstance(kind, str):
        return
    marks = (".lora_", ".modules_to_save.")
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and not any(m in n for m in marks)}
    for name, parameter in biases.items():
        if parts.of(name) not in scope:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in biases.values()):
        where = "no layer" if kind == "all" else "no layer with an adapter"
        raise ConfigError(f"adapter.bias={kind}: {where} in {'+'.join(scope)} has a bias; use none")


def train_in_full(model: Any) -> None:
    """Put all trained weights in float32, as PEFT does with those of the adapter itself, but not with the biases and
    modules beside it: 16 bits round small steps away, and a gradient scaler refuses float16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_saved(model: Any) -> None:
    """Raise ConfigError where PEFT would not save a weight that trains: better now than when the run is over."""
    saved = {tensor.data_ptr() for tensor in adapter_state(model).values()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.numel() and p.data_ptr() not in saved]
    if lost:
        raise ConfigError(f"adapter: PEFT would train but not save {len(lost)} weights, among them {lost[0]}")


def with_lora_in_one_step(model: Any, setting: str) -> Any:
    """`model`, whose plain LoRA layers compute as `models.lora` does, where `model.rewrites=setting` asks for it.

    A layer changes its class in place: PEFT makes its layers by itself, and one made anew would draw its weights again.
    """
    if not LORA.used(setting, next(model.parameters()).device):
        return model
    from peft.tuners.lora.layer import Linear

    class OneStep(Fast, Linear):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = None if self.plain or args or kwargs else in_one_step(self, x)
            return super().forward(x, *args, **kwargs) if out is None else out

    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = OneStep
    return model


def set_total_steps(model: Any, config: Config, steps: int) -> None:
    """Tell AdaLoRA how many steps the run has, where `adapter.total_step` doesn't: its ranks shrink by that.

    Raises ConfigError where so few steps leave none between `tinit` and `tfinal`.
    """
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None and config.adapter.fields.get("total_step") is None:
        build_config("adalora", {**names_as_lists(config.adapter.fields), "total_step": steps})
        allocator.set_total_step(steps)


@without_bitsandbytes()
def adapter_state(
    model: Any, state: dict[str, torch.Tensor] | None = None, *, embeddings: bool | str = False
) -> dict[str, torch.Tensor]:
    """The tensors that PEFT saves of an adapter, out of `state` (the model's own); empty for a model without one.

    `embeddings`: whether the base's own are among them, unchanged; `auto`: as PEFT decides.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return {}
    return get_peft_model_state_dict(model, state, save_embedding_layers=embeddings)


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
