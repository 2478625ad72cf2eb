"""The fields of the config classes in the installed PEFT and transformers, for `fields`.

python -m vlmtune.config.installed > src/vlmtune/config/known_fields.json
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from importlib.metadata import version
from typing import Any

from vlmtune.packages import without_bitsandbytes

NOT_FOR_USERS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
}


@without_bitsandbytes()
def adapter_fields() -> dict[str, list[str]]:
    """The fields that a user may set, per PEFT method (`lora`, `ia3`, ...)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {
        str(kind.value).lower(): [f.name for f in dataclasses.fields(cls) if f.name not in NOT_FOR_USERS]
        for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }


def quantization_fields() -> dict[str, list[str]]:
    """The parameters of each quantization config class, by its name in transformers (`bitsandbytes_4bit`, ...)."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return {
        method: [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for method, cls in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
    }


def attentions() -> dict[str, list[str]]:
    """The attention implementations of transformers, which have no fields."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = [
        name for name, function in ALL_ATTENTION_FUNCTIONS.items() if function.__module__.startswith("transformers.")
    ]
    return {name: [] for name in ("eager", *own)}


def table() -> dict[str, Any]:
    """Per group: the package, its version, and the fields of each of its methods."""
    return {
        "adapter": {"package": "peft", "version": version("peft"), "methods": adapter_fields()},
        "quantization": {
            "package": "transformers",
            "version": version("transformers"),
            "methods": quantization_fields(),
        },
        "attention": {"package": "transformers", "version": version("transformers"), "methods": attentions()},
    }


def written(found: dict[str, Any]) -> str:
    """A table as JSON, with one line per method."""
    lines = []
    for group, known in found.items():
        head = f'"{group}": {{"package": "{known["package"]}", "version": "{known["version"]}", "methods": {{'
        methods = [f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in sorted(known["methods"].items())]
        lines.append(f" {head}\n  " + ",\n  ".join(methods) + "\n }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    print(written(table()), end="")
