"""One vocabulary of parts: every weight is in exactly one, the same one under an adapter and on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import tiny
from vlmtune.config.schema import PARTS
from vlmtune.errors import ModelError
from vlmtune.models.adapters import adapt
from vlmtune.models.parts import find_parts, summary

# PEFT 0.19 still asks transformers 5 for the property's old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

EXPECTED = {
    "qwen2_vl": {
        "model.visual.patch_embed.proj.weight": "vision",
        "model.visual.blocks.1.attn.qkv.weight": "vision",
        "model.visual.merger.mlp.0.weight": "projector",
        "model.language_model.embed_tokens.weight": "language",
        "model.language_model.layers.0.self_attn.q_proj.weight": "language",
        "lm_head.weight": "head",
    },
    "llava": {
        "model.vision_tower.embeddings.class_embedding": "vision",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": "vision",
        "model.multi_modal_projector.linear_1.weight": "projector",
        "model.language_model.norm.weight": "language",
        "lm_head.weight": "head",
    },
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_weight_is_in_the_part_that_its_name_says(model_of: Callable[[str], Any], family: str) -> None:
    model = model_of(family)
    parts = find_parts(model)
    names = [name for name, _ in model.named_parameters()]
    assert set(EXPECTED[family]) <= set(names)
    assert {name: parts.of(name) for name in EXPECTED[family]} == EXPECTED[family]
    assert {parts.of(name) for name in names} == {"vision", "projector", "language", "head"}
    vision = [name for name in names if parts.of(name) == "vision"]
    assert all(name.startswith(("model.visual.", "model.vision_tower.")) for name in vision)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_parts_add_up_to_the_model(model_of: Callable[[str], Any], family: str) -> None:
    model = model_of(family)
    found = summary(model, find_parts(model))
    assert sum(row["total"] for row in found.values()) == sum(p.numel() for p in model.parameters())
    assert list(found) == [part for part in PARTS if part in found], "in the order of the data flow"
    assert all(row["quantized"] == 0 for row in found.values())


def test_a_tied_head_is_the_language_models_embedding(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_vl_tied")
    parts = find_parts(model)
    assert parts.of("lm_head") == "language"
    assert "head" not in summary(model, parts)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_equal_on_the_meta_device_and_under_an_adapter(
    model_of: Callable[[str], Any], checkpoint_of: Callable[[str], Path], family: str
) -> None:
    """Quantization decides on a skeleton without weights what training then names on the real model."""
    model = model_of(family)
    parts = find_parts(model)
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint_of(family)))
    assert find_parts(skeleton) == parts
    wanted = {name: parts.of(name) for name, _ in model.named_parameters()}
    adapted = adapt(model, tiny.config(None, adapter=tiny.LORA), parts)
    for name, _ in adapted.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert parts.of(name) == parts.of(f"module.{name}") == wanted[plain]


def test_a_language_model_alone_is_refused() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
    with pytest.raises(ModelError, match="has no image encoder"):
        find_parts(LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)))
