"""Checks of `adapter`: methods and fields of PEFT that can't work in a run here."""

from __future__ import annotations

from vlmtune.config import fields as known_fields
from vlmtune.config.schema import MethodConfig

METHODS = {
    "adaption_prompt": "only supports the layers of text models",
    "poly": "needs a task number for each row",
    "shadow": "adds a second model with its own loss",
    "xlora": "combines adapters that are already trained",
}
"""PEFT methods that need more than a vision-language model and rows."""
REFUSED_FIELDS = {
    "alora_invocation_tokens": "is only read by PEFT's text models",
    "arrow_config": "combines adapters that are already trained",
    "kasa_config": "needs its own loss in addition to the model's",
    "monteclora_config": "needs its own loss in addition to the model's",
    "megatron_config": "is for models with Megatron layers",
    "megatron_core": "is for models with Megatron layers",
    "qalora_group_size": "is for GPTQ layers",
    "save_only_topk_weights": "saves too little of VB-LoRA to resume from",
    "use_qalora": "is for GPTQ layers",
}
"""Fields, most of them LoRA's, that would have no effect, or not the effect that their papers describe."""
STARTS = ("eva", "corda", "lora_ga")
"""Values of init_lora_weights that need a pass over the data before training."""


def problems(adapter: MethodConfig, *, bits: int | None) -> list[str]:
    """Problems of `adapter` that are known without the model. `bits`: of the base weights; None: not quantized."""
    method = adapter.method
    own = known_fields.methods("adapter", str(method), ()).get(str(method), ())
    if method in METHODS or "num_virtual_tokens" in own:
        reason = METHODS.get(
            str(method), "adds tokens before the text, which labels and image positions don't account for"
        )
        return [f"adapter.method={method}: {reason}; use another method, for instance lora"]
    found = [f"adapter.{key}: {why}; leave it out" for key, why in REFUSED_FIELDS.items() if adapter.fields.get(key)]
    if method == "trainable_tokens" and not adapter.fields.get("token_indices"):
        found.append("adapter.token_indices: missing; give the ids of the tokens whose embeddings train")
    start = str(adapter.fields.get("init_lora_weights", ""))
    if start in STARTS:
        found.append(
            f"adapter.init_lora_weights={start}: needs a pass over the data before training, which vlmtune does not "
            "do; use true, gaussian, orthogonal, olora or pissa"
        )
    if start.startswith("pissa_niter"):
        found.append(
            f"adapter.init_lora_weights={start}: its random decomposition differs each time it is loaded, so a saved "
            "adapter would not fit; use pissa"
        )
    return found + quantized_problems(adapter, bits)


def quantized_problems(adapter: MethodConfig, bits: int | None) -> list[str]:
    """What PEFT does not support on quantized weights."""
    method, start = adapter.method, str(adapter.fields.get("init_lora_weights", ""))
    found = []
    if method in ("loha", "lokr") and bits == 4:
        found.append(
            f"adapter={method}: PEFT does not support it on 4-bit weights; use quantization=int8 or none, or another "
            "adapter, for instance adapter=lora"
        )
    if bits is not None and start.startswith(("pissa", "olora", "loftq")):
        found.append(
            f"adapter.init_lora_weights={start}: decomposes the base weights, which must not be quantized; "
            "use quantization=none, or adapter=lora"
        )
    return found
