"""Which fields of `quantization` a method reads, where its class doesn't say so."""

from __future__ import annotations

from vlmtune.config.schema import MethodConfig

OTHERS = {
    "bitsandbytes_4bit": ("load_in_8bit", "llm_int8_t", "llm_int8_h"),
    "bitsandbytes_8bit": ("load_in_4bit", "bnb_"),
}
"""Prefixes of fields in transformers' shared bitsandbytes class that only the other method reads."""


def problems(quantization: MethodConfig) -> list[str]:
    """Problems of `quantization` that are known without the model, such as fields without effect."""
    method, fields = str(quantization.method), quantization.fields
    found = [
        f"quantization.{key}: {method} does not read it; leave it out"
        for key in fields
        if key.startswith(OTHERS.get(method, ())) or key == "llm_int8_enable_fp32_cpu_offload"
    ]
    kind = fields.get("bnb_4bit_quant_type", "nf4")
    if kind not in ("nf4", "fp4"):
        found.append(f"quantization.bnb_4bit_quant_type={kind}: choose from: fp4, nf4")
    own = {"bitsandbytes_4bit": "load_in_4bit", "bitsandbytes_8bit": "load_in_8bit"}.get(method)
    if own and fields.get(own) is not True:
        found.append(f"quantization.{own}={fields.get(own)}: must be true with quantization.method={method}")
    return found
