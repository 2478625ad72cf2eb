"""A PEFT config from the keys of `adapter`, and which methods and fields a run can't train as plain PEFT would."""

from __future__ import annotations

from vlmtune.config import fields as known_fields
from vlmtune.config.schema import MethodConfig

METHODS = {
    "adaption_prompt": "knows the layers of text models alone",
    "poly": "needs a task number with each row",
    "shadow": "adds a second model with a loss of its own",
    "xlora": "mixes adapters that are trained already",
}
"""Methods of PEFT's registry that need more than a vision-language model and its rows."""
REFUSED_FIELDS = {
    "alora_invocation_tokens": "is only read by PEFT's text models",
    "arrow_config": "mixes adapters that are trained already",
    "kasa_config": "needs a loss of its own beside the model's",
    "monteclora_config": "needs a loss of its own beside the model's",
    "megatron_config": "is for models in Megatron's layers",
    "megatron_core": "is for models in Megatron's layers",
    "qalora_group_size": "is for GPTQ's layers",
    "save_only_topk_weights": "saves too little of VB-LoRA to go on from",
    "use_qalora": "is for GPTQ's layers",
}
"""Fields, most of them LoRA's, that would change nothing, or train something else than their papers."""
STARTS = ("eva", "corda", "lora_ga")
"""Values of init_lora_weights that PEFT computes from a pass over the data before training."""


def problems(adapter: MethodConfig, *, bits: int | None) -> list[str]:
    """What is known of `adapter` without its model. `bits`: of the weights under it, None where they are whole."""
    method = adapter.method
    own = known_fields.methods("adapter", str(method), ()).get(str(method), ())
    if method in METHODS or "num_virtual_tokens" in own:
        reason = METHODS.get(
            str(method), "puts tokens in front of the text, which labels and image positions don't count"
        )
        return [f"adapter.method={method}: {reason}; use another method, for instance lora"]
    found = [f"adapter.{key}: {why}; leave it out" for key, why in REFUSED_FIELDS.items() if adapter.fields.get(key)]
    if method == "trainable_tokens" and not adapter.fields.get("token_indices"):
        found.append("adapter.token_indices: missing; give the ids of the tokens whose embeddings train")
    start = str(adapter.fields.get("init_lora_weights", ""))
    if start in STARTS:
        found.append(
            f"adapter.init_lora_weights={start}: needs a pass over the data before training, which vlmtune does not "
            "make; use true, gaussian, orthogonal, olora or pissa"
        )
    if start.startswith("pissa_niter"):
        found.append(
            f"adapter.init_lora_weights={start}: its random decomposition differs at each loading, so a saved adapter "
            "would not fit; use pissa"
        )
    return found + quantized_problems(adapter, bits)


def quantized_problems(adapter: MethodConfig, bits: int | None) -> list[str]:
    """What PEFT can't put over quantized weights."""
    method, start = adapter.method, str(adapter.fields.get("init_lora_weights", ""))
    found = []
    if method in ("loha", "lokr") and bits == 4:
        found.append(
            f"adapter={method}: PEFT can't put it on 4-bit weights; use quantization=int8 or none, or another adapter, "
            "for instance adapter=lora"
        )
    if bits is not None and start.startswith(("pissa", "olora", "loftq")):
        found.append(
            f"adapter.init_lora_weights={start}: splits the weights themselves, which quantized ones don't allow; "
            "use quantization=none, or adapter=lora"
        )
    return found
