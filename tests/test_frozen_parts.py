"""Nothing below the first trainable weight is kept for the backward pass or computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_families
from grids import sampled, thinned
from kept import Kept
from vlmtune.batching.layout import Batch, padded
from vlmtune.models import adapters, gradient_checkpointing
from vlmtune.models.parts import base_of, find_parts
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]
FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
TOP = {**tiny.LORA, "layers_to_transform": [1], "target_modules": ["q_proj", "v_proj", "down_proj"]}
VISION = {**tiny.LORA, "parts": ["vision"]}
FROZEN = {"freeze": ["vision", "projector"]}
SEVERAL = [tiny.record("What?", "Red"), tiny.record("Is it?", "yes it is")]


def prepared(untrained: Any, *, on: bool, **config: Any) -> Any:
    """`untrained` as a run prepares it, in training mode. LoRA's B is not zero, so that A gets a gradient too."""
    chosen = tiny.config(None, gradient_checkpointing=on, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = adapters.adapt(untrained, chosen, find_parts(untrained))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    gradient_checkpointing.prepare(model, chosen.trainer)
    return model.train()


def tower_of(model: Any) -> Any:
    return base_of(model).get_encoder(modality="image")


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    summed_loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sampled(FAMILIES, ("qwen2_vl", "llava")))
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("trained", [{"adapter": tiny.LORA}, {"model": FROZEN}], ids=["lora", "all but the tower"])
def test_a_frozen_tower_runs_once_and_keeps_nothing(
    family: str, on: bool, trained: Any, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    """A hook on every embedding, its own too, would have the tower's graph kept and each block computed twice."""
    model = prepared(model_of(family), on=on, **trained)
    tower, calls, outputs = tower_of(model), [], []
    for module in tower.modules():
        if not [*module.children()]:
            module.register_forward_hook(lambda module, args, out: calls.append(id(module)))
    with Kept(model) as kept:
        tower.register_forward_pre_hook(lambda module, args: outputs.append(kept.now))
        tower.register_forward_hook(lambda module, args, out: outputs.append((out[0].requires_grad, kept.now)))
        summed_loss(model, padded(encoder_of(family), SEVERAL[:1])).backward()
    before, after = outputs
    assert after == (False, before)
    assert kept.peak > before
    forward = len(calls)
    with torch.no_grad():
        calls.clear()
        summed_loss(model.eval(), padded(encoder_of(family), SEVERAL[:1]))
    assert forward == len(calls), "the tower ran in the backward pass too"


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("trained", ["adapter", "embedding frozen"])
def test_frozen_lower_layers_keep_nothing(
    on: bool, trained: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    model = model_of("qwen2_vl")
    if trained == "adapter":
        model = prepared(model, on=on, adapter=TOP)
    else:
        model = prepared(model, on=on)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." in name)
    layers, seen = base_of(model).get_decoder().layers, []
    with Kept(model) as kept:
        layers[0].register_forward_hook(lambda module, args, out: seen.append((out.requires_grad, kept.now)))
        summed_loss(model, padded(encoder_of("qwen2_vl"), SEVERAL)).backward()
    assert seen == [(False, 0)], "computed once, without a graph"


@pytest.mark.parametrize("family", sampled(FAMILIES, ("qwen2_vl", "idefics")))
@pytest.mark.parametrize("trained", thinned([{"adapter": tiny.LORA}, {"adapter": VISION}, {"model": FROZEN}, {}], 2))
def test_checkpointing_changes_no_gradient(
    family: str, trained: Any, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    batch = padded(encoder_of(family), SEVERAL)
    wanted, found = (gradients(prepared(model_of(family), on=on, **trained), batch) for on in (False, True))
    assert wanted.keys() == found.keys()
    assert any(bool(gradient.any()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", thinned(["nf4", "int8"], 1))
def test_a_quantized_model_needs_no_hook_either(checkpoint_of: Callable[[str], Path], kind: str) -> None:
    found = []
    for on in (False, True):
        config = tiny.config(
            checkpoint_of("qwen2_vl"), adapter=TOP, quantization=tiny.QUANTIZED[kind], gradient_checkpointing=on
        )
        run = tiny.assemble(config, tiny.records(4))
        layer, seen = base_of(run.model).get_decoder().layers[0], []
        with Kept(run.model) as kept:
            layer.register_forward_hook(lambda module, args, out, k=kept, s=seen: s.append((out.requires_grad, k.now)))
            found.append(gradients(run.model.train(), run.loader.make(0, 0)))
        assert seen == [(False, 0)]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
