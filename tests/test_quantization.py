"""Quantized weights: those of the asked parts and no others, and adapters over them learn from right gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import tiny
from grids import sampled, thinned
from vlmtune.batching.layout import padded
from vlmtune.errors import ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.models.parts import is_quantized, summary
from vlmtune.models.quantization import quantization_config
from vlmtune.objectives.next_token import summed_loss

KINDS = [*tiny.QUANTIZED]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def assemble(folder: Path, kind: str, *, parts: list[str] | None = None, **trainer: Any) -> tiny.Run:
    quantization = {**tiny.QUANTIZED[kind], "parts": parts or ["language"]}
    config = tiny.config(folder, adapter=tiny.LORA, quantization=quantization, learning_rate=1e-2, **trainer)
    return tiny.assemble(config, tiny.records(4))


def quantized(run: tiny.Run) -> set[str]:
    plain = (
        (n.removeprefix("base_model.model.").replace(".base_layer", ""), p) for n, p in run.model.named_parameters()
    )
    return {name for name, parameter in plain if is_quantized(parameter)}


WAYS = [(family, kind) for family in (*tiny.FAMILIES, *tiny.VARIANTS) for kind in KINDS]
QUICK = [way for way in WAYS if "qwen2_vl" in way or "nf4" in way]


@pytest.mark.parametrize(("family", "kind"), sampled(WAYS, QUICK))
def test_only_the_language_models_layers_are_quantized(
    checkpoint_of: Callable[[str], Path], family: str, kind: str
) -> None:
    """transformers' own choice takes the vision tower and the projector too; a list of ours forgets the head."""
    run = assemble(checkpoint_of(family), kind)
    names = quantized(run)
    assert len(names) == 2 * len(LINEARS)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert {name.split(".")[-2] for name in names} == set(LINEARS)
    assert type(run.model.get_base_model().get_output_embeddings()) is torch.nn.Linear  # tied, its weight would hide it
    table = summary(run.model, run.parts)
    full = summary(AutoModelForImageTextToText.from_pretrained(checkpoint_of(family)), run.parts)
    lora = sum(p.numel() for name, p in run.model.named_parameters() if "lora_" in name)
    assert table["language"]["total"] == full["language"]["total"] + lora, "4-bit weights count in full"
    assert [row["quantized"] for part, row in table.items() if part != "language"] == [0] * (len(table) - 1)


def test_other_parts_where_asked(checkpoint_of: Callable[[str], Path]) -> None:
    run = assemble(checkpoint_of("llava"), "nf4", parts=["vision", "projector"])
    assert {run.parts.of(name) for name in quantized(run)} == {"vision", "projector"}


@pytest.mark.parametrize("kind", thinned(KINDS, 2))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_lowers_the_loss(checkpoint_of: Callable[[str], Path], family: str, kind: str) -> None:
    run = assemble(checkpoint_of(family), kind, max_steps=6).fit()
    assert run.losses[3] < run.losses[0]
    assert run.losses[5] < run.losses[0] - 0.1


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("family", thinned(tiny.FAMILIES, 2))
def test_gradients_after_an_evaluation_are_those_before(
    checkpoint_of: Callable[[str], Path], family: str, kind: str
) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in evaluation; gradients then are wrong, silently."""
    run = assemble(checkpoint_of(family), kind).fit()
    layers = [m for m in run.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * len(LINEARS)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)

    batch = padded(run.encoder, tiny.records(3))

    def gradients() -> dict[str, torch.Tensor]:
        run.model.train().zero_grad()
        summed_loss(run.model, batch).backward()
        return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}

    before = gradients()
    options = {"batch_size": 2, "autocast": run.engine.autocast}
    generate(run.model, run.encoder, tiny.records(2), run.config.generation, **options)
    with torch.no_grad():
        summed_loss(run.model.eval(), batch)
    after = gradients()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_quantized_model_is_near_the_full_one(
    checkpoint_of: Callable[[str], Path], model_of: Any, family: str
) -> None:
    """Near enough that layers and weights can't have been mixed up."""
    run = assemble(checkpoint_of(family), "nf4")
    batch = padded(run.encoder, tiny.records(3))
    with torch.no_grad():
        wanted = model_of(family)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs).logits
        found = run.model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs).logits
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.9


def test_null_means_the_type_that_the_run_computes_in() -> None:
    found = quantization_config(
        tiny.method({**tiny.QUANTIZED["nf4"], "bnb_4bit_quant_storage": None}), ["visual"], torch.bfloat16
    )
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert found.bnb_4bit_quant_storage == torch.uint8
    chosen = {**tiny.QUANTIZED["nf4"], "bnb_4bit_compute_dtype": "float16", "llm_int8_skip_modules": ["mine"]}
    found = quantization_config(tiny.method(chosen), ["visual"], torch.bfloat16)
    assert (found.bnb_4bit_compute_dtype, found.llm_int8_skip_modules) == (torch.float16, ["mine", "visual"])


def test_a_value_that_the_class_refuses_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="quantization: "):
        quantization_config(tiny.method({**tiny.QUANTIZED["nf4"], "load_in_4bit": "many"}), [], torch.float32)
