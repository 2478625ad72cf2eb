"""The memory planner: figures against real classes, bytes against real tensors, and what it advises."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import tiny
from grids import thinned
from vlmtune import planning
from vlmtune.config import compose
from vlmtune.config.schema import Config, ModelConfig, home
from vlmtune.errors import ConfigError
from vlmtune.models.load import load
from vlmtune.models.parts import Parts, find_parts
from vlmtune.planning import advice, passes
from vlmtune.planning.architecture import architecture_of, shallow
from vlmtune.planning.computing import Computing
from vlmtune.planning.estimate import Plan
from vlmtune.planning.meter import META, Meter
from vlmtune.planning.packed import pack
from vlmtune.planning.rows import Row, assumed, shape_of
from vlmtune.planning.skeleton import Machine, Skeleton, build
from vlmtune.prompt.processors import load_processor
from vlmtune.record import environment

FILES = {file.stem: file for file in sorted((home() / "conf" / "model").glob("*.yaml"))}
FIGURES = [name for name, file in FILES.items() if "architecture:" in file.read_text()]
GPU, CPU = Machine(torch.device("cuda"), "bf16"), Machine(torch.device("cpu"), "no")


def figures(name: str) -> ModelConfig:
    return ModelConfig(path="somebody/model", architecture=yaml.safe_load(FILES[name].read_text())["architecture"])


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------- figures


def test_every_model_of_the_hub_has_its_figures() -> None:
    assert set(FILES) - set(FIGURES) == {"auto", "pico"}


@pytest.mark.parametrize("name", thinned(FIGURES, 3))
def test_the_figures_make_a_model_of_the_published_size(name: str) -> None:
    """A wrong width or depth shows: the files name the size that the authors publish."""
    config = Config(model=figures(name))
    config.model.dtype = "bf16"
    model = build(config, architecture_of(config.model), GPU).model
    stated = re.search(r": ([\d.]+) billion parameters", FILES[name].read_text())
    assert stated is not None
    digits = len(stated[1].partition(".")[2])
    assert round(count(model) / 1e9, digits) == float(stated[1])


@pytest.mark.parametrize("name", thinned(FIGURES, 2))
def test_a_pass_of_every_family_can_be_counted(name: str) -> None:
    config = tiny.config(None, adapter=tiny.LORA)
    config.model = figures(name)
    architecture = shallow(architecture_of(config.model), 4)
    batch = assumed(architecture, Row(shape_of(architecture).tokens(1280 if "qwen" in name else None)))(1)
    peaks = passes.measured(build(config, architecture, GPU), config, GPU, batch)
    assert max(peak.activations for peak in peaks.values()) > 1e7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "model.architecture: missing"),
        ({"model_type": "qwen2_vla"}, "model_type=qwen2_vla"),
        ({"model_type": "llava", "text_config": {"hidden_sizes": 3}}, "model.architecture.text_config.hidden_sizes"),
        ({"model_type": "llava", "depth": 3}, "model.architecture.depth: LlavaConfig has no such figure"),
    ],
)
def test_figures_that_would_change_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        architecture_of(ModelConfig(path="somebody/model", architecture=changes))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", thinned(["qwen2_vl_tied", "llava", "internvl", "idefics", "gemma3"], 2))
def test_weights_by_part_are_those_of_the_opened_model(checkpoint_of: Callable[[str], Path], name: str) -> None:
    config = tiny.config(checkpoint_of(name), adapter=tiny.LORA)
    processor = load_processor(config.model)
    planned = build(config, architecture_of(config.model, processor), CPU)
    types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    real, _ = load(config.model, config.quantization, **types)
    parts, found = find_parts(real), {}
    for key, parameter in real.named_parameters():
        found[parts.of(key), "fp32"] = found.get((parts.of(key), "fp32"), 0) + parameter.nbytes
    own = planned.weights()
    assert {key: size for key, size in own.items() if key[0] not in ("adapter", "buffers")} == found
    assert own["adapter", "fp32"] == sum(parameter.nbytes for parameter in planned.trained())


def test_quantized_layers_take_what_bitsandbytes_stores(checkpoint_of: Callable[[str], Path]) -> None:
    quantization = tiny.method(tiny.QUANTIZED["nf4"])
    model = ModelConfig(path=str(checkpoint_of("llava")))
    types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    real, processor = load(model, quantization, **types)
    stored = 0
    for parameter in real.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            stored += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    plain = copy.deepcopy(architecture_of(model, processor))
    config = Config(model=model)
    planned = build(config, plain, CPU)
    pack(planned.model, planned.parts, quantization, torch.float32)
    assert Skeleton(planned.model, planned.parts).weights()["language", "4 bits"] == stored


# ---------------------------------------------------------------- passes


class Square(nn.Module):
    """Two layers of 1,000 x 1,000 weights, with a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(1000, 1000, bias=False, device=META) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu()).sum()
        return out


def test_bytes_count_while_something_refers_to_them() -> None:
    """By hand: 100 rows of 1,000 floats are 0.4 MB, a gradient of a layer is 4 MB."""
    model, x = Square(), torch.empty(100, 1000, device=META)
    with Meter([*model.parameters(), x]) as meter:
        loss = model(x)
        assert meter.live == pytest.approx(0.4e6, abs=1e4)  # the ReLU's output alone: it serves both layers
        assert meter.peaks[0][0] == pytest.approx(0.8e6, abs=1e4)
        meter.phase = 1
        loss.backward()
    assert meter.peaks[1][0] == pytest.approx(8e6 + 0.8e6, rel=0.06)
    assert meter.live == pytest.approx(8e6, abs=1e4)


def test_autocast_keeps_halves_of_inputs_and_weights() -> None:
    model, x = Square(), torch.empty(100, 1000, device=META)
    with Meter([*model.parameters(), x]) as meter, Computing(torch.bfloat16) as computing:
        loss = model(x)
        computing.end_forward()
    kept = 2e6 + 2 * 0.2e6  # the second layer's weight, which the first one's gradient needs, and both inputs, in bf16
    assert loss.device == META
    assert meter.live == pytest.approx(kept, rel=0.06)


@pytest.fixture
def deep(checkpoint_of: Callable[[str], Path]) -> tuple[Config, Any]:
    """A config and an architecture of 16 layers."""
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA)
    architecture = architecture_of(config.model, load_processor(config.model))
    text = architecture.get_text_config()
    text.num_hidden_layers, text.layer_types = 16, ["full_attention"] * 16
    return config, architecture


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_deep_model_is_extrapolated_exactly(deep: tuple[Config, Any], recomputed: bool) -> None:
    config, architecture = deep
    config.trainer.gradient_checkpointing = recomputed
    batches = assumed(architecture, Row(16))
    whole = passes.measured(build(config, architecture, GPU), config, GPU, batches(2))
    found = passes.passing(config, architecture, GPU, batches, 2)
    assert found.total == pytest.approx(max(peak.total for peak in whole.values()), rel=0.01)


def test_less_is_needed_with_each_switch_that_saves(deep: tuple[Config, Any]) -> None:
    config, architecture = deep
    plan = Plan(architecture, lambda _: assumed(architecture, Row(16)))
    found = [plan.of(config), *(variant.estimate for variant in advice.variants(plan, config, 1))]
    assert found[1].step < found[0].step  # recomputed
    assert found[2].step < found[1].step  # one row
    sharded = copy.deepcopy(config)
    sharded.sharding.name = "fsdp"
    assert plan.of(sharded, processes=4).state == plan.of(config).state / 4


def test_the_largest_micro_batch_fits_and_one_more_row_does_not(deep: tuple[Config, Any]) -> None:
    config, architecture = deep
    plan = Plan(architecture, lambda _: assumed(architecture, Row(16)))
    limit = plan.of(config, 20).total
    most = plan.largest(config, limit)
    assert plan.of(config, most).total <= limit * 1.001 < plan.of(config, most + 2).total


# ---------------------------------------------------------------- the answer


def test_the_answer_for_a_folder_and_a_table(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA)
    config.data.train = str(tiny.write_csv(tmp_path, [("what?", "red"), ("how many circles are there?", "two")]))
    said = planning.answer(config, Row(None), ["model=auto"], reads_data=True)
    assert "2 rows, tokens of a row: median" in said
    assert "counted by the processor" in said
    assert re.search(r"16 GB +yes", said)
    assert said.endswith("model=auto")


def test_a_plan_refuses_what_a_run_refuses_and_several_runs() -> None:
    from vlmtune.cli import plan
    from vlmtune.launch.world import ALONE

    wrong = ["model=qwen2vl_7b", "plan.text_tokens=5", "plan.image=3", "trainer.epoch=2", "adapter.r=1,2"]
    with pytest.raises(ConfigError) as caught:
        plan.check(wrong, False, ALONE)
    said = "\n".join(caught.value.problems)
    for part in ("plan.image: no such key", "trainer.epoch: no such key", "adapter.r=1,2: a plan is for one run"):
        assert part in said


def test_a_run_still_refuses_the_keys_of_a_plan() -> None:
    with pytest.raises(ConfigError, match="plan: no such key"):
        compose.read("train", ["plan.text_tokens=5"])


def test_parts_of_a_skeleton_are_those_of_the_model(deep: tuple[Config, Any]) -> None:
    config, architecture = deep
    assert isinstance(build(config, architecture, CPU).parts, Parts)


@pytest.mark.parametrize("rewrites", ["auto", "off"])
def test_a_run_predicts_its_own_memory(
    rewrites: str, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vlmtune.planning.predicted"], "SMALL", 0)
    monkeypatch.setattr(environment.PEAK, "predicted", 0)
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, model={"rewrites": rewrites})
    made = tiny.assemble(config, tiny.records(4))
    assert environment.PEAK.predicted > sum(parameter.nbytes for parameter in made.model.parameters())
