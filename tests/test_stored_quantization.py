"""Which layers end up quantized, and checkpoints that are stored quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import tiny
from vlmtune.config import quantization_fields
from vlmtune.errors import ConfigError, ModelError
from vlmtune.models.parts import is_quantized, summary

WHOLE = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}


def opened(folder: Path, kind: str, **fields: Any) -> tiny.Run:
    config = tiny.config(folder, adapter=tiny.LORA, quantization={**tiny.QUANTIZED[kind], **fields})
    return tiny.assemble(config, tiny.records(2))


def quantized_layers(run: tiny.Run) -> set[str]:
    named = run.model.named_parameters()
    return {n.removeprefix("base_model.model.").removesuffix(".weight") for n, p in named if is_quantized(p)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_part_inside_another_is_quantized_alone(checkpoint_of: Callable[[str], Path], kind: str) -> None:
    """Qwen's projector is in its vision tower, and transformers takes a skipped name for all that is under it."""
    found = quantized_layers(opened(checkpoint_of("qwen2_vl"), kind, parts=["projector"]))
    assert found == {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}


def test_the_tower_around_a_part_is_quantized_without_it(checkpoint_of: Callable[[str], Path]) -> None:
    found = quantized_layers(opened(checkpoint_of("qwen2_vl"), "nf4", parts=["vision"]))
    assert found
    assert all(name.startswith("model.visual.blocks.") for name in found)


def test_skipped_names_are_added_to_ours(checkpoint_of: Callable[[str], Path]) -> None:
    run = opened(checkpoint_of("llava"), "nf4", llm_int8_skip_modules=["down_proj"])
    found = {name.replace(".base_layer", "") for name in quantized_layers(run)}
    assert len(found) == 12
    assert not [name for name in found if name.endswith("down_proj") or "language_model" not in name]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llava", {"parts": ["cross_attention"]}, r"quantization\.parts: this model has no linear layer in cross_att"),
        ("qwen2_vl_tied", {"parts": ["head"]}, "head is tied to the input embedding"),
        ("llava", {"llm_int8_skip_modules": ["q_prj"]}, "q_prj matches nothing; did you mean q_proj"),
    ],
)
def test_what_would_stay_whole_is_an_error(
    checkpoint_of: Callable[[str], Path], family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(checkpoint_of(family), "nf4", **fields)


def test_a_part_whose_every_layer_is_skipped(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"quantization\.parts: no layer of projector has been quantized"):
        opened(checkpoint_of("qwen2_vl"), "nf4", parts=["projector"], llm_int8_skip_modules=["merger"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**tiny.QUANTIZED["nf4"], "llm_int8_threshold": 3.0},
            "llm_int8_threshold: bitsandbytes_4bit does not read it",
        ),
        ({**tiny.QUANTIZED["nf4"], "load_in_4bit": False}, "load_in_4bit=False: must be true"),
        ({**tiny.QUANTIZED["nf4"], "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type=nf5: choose from: fp4, nf4"),
        ({**tiny.QUANTIZED["int8"], "bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type: bitsandbytes_8bit does not"),
        ({**tiny.QUANTIZED["int8"], "llm_int8_enable_fp32_cpu_offload": True}, "does not read it; leave it out"),
    ],
)
def test_fields_of_the_other_method_are_refused(fields: dict[str, Any], message: str) -> None:
    (problem,) = quantization_fields.problems(tiny.config(None, quantization=fields).quantization)
    assert message in problem


@pytest.mark.parametrize("kind", tiny.QUANTIZED)
def test_the_usual_fields_are_not(kind: str) -> None:
    assert quantization_fields.problems(tiny.config(None, quantization=tiny.QUANTIZED[kind]).quantization) == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("quanto", "pip install optimum-quanto"),
        ("awq", "can't quantize while loading; give a checkpoint that is stored so"),
        ("gptq", r"can't be limited to quantization\.parts"),
    ],
)
def test_other_methods_say_what_they_need(checkpoint_of: Callable[[str], Path], method: str, message: str) -> None:
    config = tiny.config(checkpoint_of("llava"), quantization={"method": method, "parts": ["language"]})
    with pytest.raises(ConfigError, match=message):
        tiny.assemble(config, tiny.records(2))


# ---------------------------------------------------------------- stored so


@pytest.fixture(params=[4, 8])
def stored(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> tuple[int, Path]:
    """A checkpoint whose language model is stored in so many bits."""
    bits = request.param
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    kinds = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, 8: {"load_in_8bit": True}}
    wanted = BitsAndBytesConfig(llm_int8_skip_modules=skip, **kinds[bits])
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_of("llava"), quantization_config=wanted)
    folder = Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "stored"))
    model.save_pretrained(folder)
    return bits, folder


def test_an_adapter_trains_over_a_stored_checkpoint(stored: tuple[int, Path]) -> None:
    config = tiny.config(stored[1], adapter=tiny.LORA, learning_rate=1e-2, max_steps=6)
    run = tiny.assemble(config, tiny.records(4)).fit()
    assert run.losses[5] < run.losses[0] - 0.1
    table = summary(run.model, run.parts)
    assert table["language"]["quantized"] > 0
    assert table["vision"]["quantized"] == 0
    computed = {m.compute_dtype for m in run.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert computed == ({torch.float32} if stored[0] == 4 else set()), "the run's own type, not the checkpoint's"


def test_stored_weights_are_not_trained_themselves_nor_quantized_again(stored: tuple[int, Path]) -> None:
    bits, folder = stored
    with pytest.raises(ConfigError, match=f"adapter=none: the weights of .* are stored in {bits} bits.*adapter=lora"):
        tiny.assemble(tiny.config(folder), tiny.records(2))
    with pytest.raises(ConfigError, match=f"is stored in {bits} bits already; use quantization=none"):
        opened(folder, "nf4")


@pytest.mark.parametrize(
    "fields",
    [{**tiny.LORA, "init_lora_weights": "pissa"}, {"method": "loha", "target_modules": "all-linear"}],
    ids=["pissa", "loha"],
)
def test_rules_for_quantized_weights_hold_for_stored_ones(stored: tuple[int, Path], fields: dict[str, Any]) -> None:
    bits, folder = stored
    if fields["method"] == "loha" and bits == 8:
        pytest.skip("PEFT puts LoHa on 8-bit weights")
    config = tiny.config(folder, adapter={"parts": ["language"], **fields})
    with pytest.raises(ConfigError, match=r"quantization=none|use quantization=int8"):
        tiny.assemble(config, tiny.records(2))


@pytest.mark.parametrize(
    ("stored_as", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "says that the weights are quantized, but they are not",
        ),
        ({"quant_method": "zzz"}, "can't read its quantization_config"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, stored_as: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "odd"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": stored_as}))
    with pytest.raises(ModelError, match=message):
        tiny.assemble(tiny.config(folder, adapter=tiny.LORA), tiny.records(2))
