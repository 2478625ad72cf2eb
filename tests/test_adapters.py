"""Adapters land where they were meant to, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import tiny
from grids import thinned
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.models.adapters import adapt, set_total_steps
from vlmtune.models.parts import find_parts
from vlmtune.models.saved_adapter import load_adapter
from vlmtune.training.model_folder import save_model

# PEFT 0.19 still asks transformers 5 for the property's old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FAMILIES = [*tiny.FAMILIES]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model: Any, **fields: Any) -> set[str]:
    """Names of the base modules that get an adapter."""
    config = tiny.config(None, adapter={**tiny.LORA, **fields})
    wrapped = adapt(model, config, find_parts(model))
    marks = ("lora_A.default", "lora_embedding_A")
    return {
        name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for name, _ in wrapped.named_modules()
        if name.endswith(marks)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_list_hits_the_language_model_alone(model_of: Callable[[str], Any], family: str) -> None:
    """PEFT by itself would also take LLaVA's vision tower, whose layers have the same names."""
    found = adapted(model_of(family), target_modules=["q_proj", "v_proj"])
    assert found == {f"model.language_model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"}


@pytest.mark.parametrize("family", [*FAMILIES, *tiny.VARIANTS])
def test_all_linear_is_every_layer_but_the_head(model_of: Callable[[str], Any], family: str) -> None:
    """A tied head is the input embedding: an adapter on it would untie them."""
    found = adapted(model_of(family), target_modules="all-linear")
    assert len(found) == 2 * len(LINEARS)
    assert {name.rsplit(".", 1)[-1] for name in found} == set(LINEARS)
    assert all(name.startswith("model.language_model.layers.") for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scope_may_be_other_parts(model_of: Callable[[str], Any], family: str) -> None:
    model = model_of(family)
    parts = find_parts(model)
    for scope in (["vision"], ["projector"], ["vision", "projector"]):
        found = tiny.targets(model, parts, "all-linear", scope)
        assert {parts.of(name) for name in found} == set(scope)
    assert {parts.of(name) for name in adapted(model, parts=["vision"])} == {"vision"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_can_be_asked_for(model_of: Callable[[str], Any], family: str) -> None:
    assert adapted(model_of(family), parts=["head"], target_modules=["lm_head"]) == {"lm_head"}


def test_a_regular_expression_stays_in_its_scope(model_of: Callable[[str], Any]) -> None:
    found = adapted(model_of("llava"), target_modules=r".*layers\.0\..*(q_proj|v_proj)")
    assert found == {f"model.language_model.layers.0.self_attn.{p}_proj" for p in "qv"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qproj"], r"adapter\.target_modules: qproj matches nothing in language; did you mean .*q_proj"),
        (["fc1"], r"fc1 is in vision only; add vision to adapter\.parts=\[language\]"),
        (".*fc1", r"fc1 is in vision only"),
        (["proj"], r"proj matches nothing"),
    ],
)
def test_a_target_that_matches_nothing_lists_candidates(
    model_of: Callable[[str], Any], targets: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(model_of("llava"), target_modules=targets)


def test_every_unmatched_target_is_reported_at_once(model_of: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(model_of("qwen2_vl"), target_modules=["a_proj", "q_proj", "b_proj"])
    assert len(caught.value.problems) == 2


def test_what_peft_refuses_is_a_config_error(model_of: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="adapter=lora: PEFT refuses it here"):
        adapted(model_of("qwen2_vl"), r=-1)
    with pytest.raises(ConfigError, match="adapter=lora: PEFT refuses it here"):
        adapted(model_of("qwen2_vl"), target_modules=["self_attn"])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains(model_of: Callable[[str], Any], family: str) -> None:
    model = model_of(family)
    wrapped = adapt(model, tiny.config(None, adapter=tiny.LORA), find_parts(model))
    assert all(p.requires_grad == ("lora_" in name) for name, p in wrapped.named_parameters())


def test_freezing_parts_without_an_adapter(model_of: Callable[[str], Any]) -> None:
    model = model_of("llava").requires_grad_(False)
    parts = find_parts(model)
    adapt(model, tiny.config(None, model={"freeze": ["vision", "head"]}), parts)
    trains = {parts.of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"projector", "language"}


# ---------------------------------------------------------------- a saved adapter


@pytest.fixture
def saved(model_of: Callable[[str], Any], encoder_of: Callable[[str], Any], tmp_path: Path) -> Path:
    model = model_of("qwen2_vl")
    wrapped = adapt(model, tiny.config(None, adapter=tiny.LORA), find_parts(model))
    save_model(wrapped, encoder_of("qwen2_vl").processor, tmp_path / "model")
    return tmp_path / "model"


def test_an_adapter_of_another_family_is_refused(saved: Path, model_of: Callable[[str], Any]) -> None:
    load_adapter(model_of("qwen2_vl"), saved)
    for file in saved.glob("adapter_model.safetensors"):
        renamed = {name.replace("language_model", "text"): t for name, t in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit this model: ."):
        load_adapter(model_of("qwen2_vl"), saved)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_an_adapter_with_other_weights_is_refused(saved: Path, model_of: Callable[[str], Any], change: str) -> None:
    """PEFT only warns, and leaves what it misses as random as it was."""
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if change == "missing":
        del tensors[first]
    elif change == "unexpected":
        tensors[first.replace("layers.0", "layers.7")] = torch.zeros(2)
    else:
        tensors[first] = tensors[first][:1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit this model: ."):
        load_adapter(model_of("qwen2_vl"), saved)


def test_an_adapter_that_is_cut_off_says_so(saved: Path, model_of: Callable[[str], Any]) -> None:
    """One that another program saved has no checksums, by which it would have been noticed earlier."""
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is damaged: .*; restore the file"):
        load_adapter(model_of("qwen2_vl"), saved)


def test_an_adapter_on_modules_that_the_model_lacks_is_refused(saved: Path, model_of: Callable[[str], Any]) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["nowhere"]}))
    with pytest.raises(CheckpointError, match=r"does not fit this model: Target modules \{'nowhere'\} not found"):
        load_adapter(model_of("qwen2_vl"), saved)


@pytest.mark.parametrize(
    "combination", thinned(["linear", "cat", "svd", "ties", "dare_linear_svd", "magnitude_prune"], 3)
)
def test_adapters_of_several_runs_merge_with_peft(
    checkpoint_of: Callable[[str], Path], encoder_of: Any, tmp_path: Path, combination: str
) -> None:
    """Runs over one base, each on rows of its own (a sweep over data.train): PEFT takes what they saved together."""
    folder = checkpoint_of("llava")
    for number in range(2):
        config = tiny.config(folder, adapter=tiny.LORA, learning_rate=1e-2, seed=number)
        run = tiny.assemble(config, tiny.records(4 + 4 * number)[-4:]).fit()
        save_model(run.model, run.processor, tmp_path / str(number))
    base = AutoModelForImageTextToText.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    density = {} if combination in ("linear", "cat", "svd") else {"density": 0.9}
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type=combination, **density)
    layer = model.base_model.model.model.language_model.layers[0].mlp.up_proj
    deltas = {name: layer.get_delta_weight(name) for name in ("a", "b", "both")}
    if combination in ("cat", "svd"):  # the others combine A and B each for itself, or prune
        wanted = 0.7 * deltas["a"] + 0.3 * deltas["b"]
        lost = torch.linalg.svdvals(wanted)[4:].norm() if combination == "svd" else torch.tensor(0.0)  # rank 4 of 8
        assert (deltas["both"] - wanted).norm() <= 1.01 * lost + 1e-5
    model.set_adapter("both")
    batch = padded(encoder_of("llava"), tiny.records(2))
    with torch.no_grad():
        assert torch.isfinite(model(**model_inputs(model, batch)).logits).all()
    assert deltas["both"].norm() > 0


def test_a_run_too_short_for_adaloras_schedule_is_refused(model_of: Callable[[str], Any]) -> None:
    """PEFT asks for the length before the steps are counted; what it says of the real one must not be lost."""
    schedule = {"method": "adalora", "parts": ["language"], "target_modules": ["q_proj"], "tinit": 3, "tfinal": 3}
    config = tiny.config(None, adapter=schedule)
    model = model_of("llava")
    adapted = adapt(model, config, find_parts(model))
    set_total_steps(adapted, config, 7)
    assert adapted.base_model.rankallocator.peft_config.total_step == 7
    with pytest.raises(ConfigError, match="schedule values don't allow"):
        set_total_steps(adapted, config, 6)
