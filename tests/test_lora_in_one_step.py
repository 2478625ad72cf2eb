"""LoRA in one step of autograd gives what plain PEFT gives, wherever it acts, and steps aside where it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import tiny
from grids import sampled
from vlmtune.models import adapters, lora
from vlmtune.models.parts import find_parts
from vlmtune.models.rewrites import Fast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of layers without a bias
]

LINEAR = {"target_modules": "all-linear"}
ACTS: dict[str, dict[str, Any]] = {
    "plain": LINEAR,
    "rslora": {**LINEAR, "use_rslora": True, "r": 4},
    "patterns": {**LINEAR, "rank_pattern": {".*layers.0.*": 3}, "alpha_pattern": {"(q|v)_proj": 40}},
    "start with values": {**LINEAR, "init_lora_weights": False},
    "orthogonal": {**LINEAR, "init_lora_weights": "orthogonal", "r": 4},
    "split weights": {**LINEAR, "init_lora_weights": "pissa"},
    "half of the layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "tokens beside": {**LINEAR, "trainable_token_indices": [5, 6]},
    "module beside": {**LINEAR, "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}
ASIDE: dict[str, dict[str, Any]] = {
    "dropout": {**LINEAR, "lora_dropout": 0.2},
    "dora": {**LINEAR, "use_dora": True},
    "bias of B": {**LINEAR, "lora_bias": True},
    "bias of the base": {"target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "lora_only"},
}


def built(model_of: Callable[[str], Any], fields: dict[str, Any], *, plain: bool) -> Any:
    model = model_of("qwen2_vl")
    torch.manual_seed(1)
    if plain:
        return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA](**fields))
    config = tiny.config(
        None, adapter={"method": "lora", "parts": ["vision", "projector", "language", "head"], **fields}
    )
    return adapters.adapt(model, config, find_parts(model))


def gradients(model: Any, *, half: bool, recomputed: bool) -> dict[str, torch.Tensor]:
    """Of what trains in the language model, on text of which the second row is padded."""
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    model.train()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(input_ids=ids, attention_mask=mask).logits.float().logsumexp(-1).mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".language_model." in name}
    return {"loss": loss.detach(), **found}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per layer that is computed in one step."""
    seen: list[Any] = []
    apply = lora.LoraProduct.apply
    monkeypatch.setattr(lora.LoraProduct, "apply", lambda *args: (seen.append(args[-1]), apply(*args))[1])
    return seen


WAYS = [(name, recomputed, half) for name in ACTS for recomputed in (False, True) for half in (False, True)]
QUICK = {
    *((name, False, False) for name in ACTS),
    *((name, *((True, True), (False, True), (True, False))[number % 3]) for number, name in enumerate(ACTS)),
}
"""Each adapter plainly, and once in one of the other ways."""


@pytest.mark.parametrize(("name", "recomputed", "half"), sampled(WAYS, QUICK))
def test_it_acts_and_gives_the_same(
    model_of: Callable[[str], Any], products: list[Any], name: str, half: bool, recomputed: bool
) -> None:
    wanted = gradients(built(model_of, ACTS[name], plain=True), half=half, recomputed=recomputed)
    assert not products
    found = gradients(built(model_of, ACTS[name], plain=False), half=half, recomputed=recomputed)
    assert products, "or two plain models are compared"
    assert set(products) == {torch.bfloat16 if half else torch.float32}
    assert set(found) <= set(wanted)
    assert len(found) > 2
    for key, gradient in found.items():
        assert gradient.dtype == wanted[key].dtype, key
        gap = float((gradient - wanted[key]).norm() / wanted[key].norm().clamp(min=1e-9))
        assert gap < (3e-2 if half else 1e-5), key


@pytest.mark.parametrize("name", ASIDE)
def test_it_steps_aside(model_of: Callable[[str], Any], products: list[Any], name: str) -> None:
    wanted = gradients(built(model_of, ASIDE[name], plain=True), half=False, recomputed=False)
    found = gradients(built(model_of, ASIDE[name], plain=False), half=False, recomputed=False)
    assert not products
    assert all(torch.equal(gradient, wanted[key]) for key, gradient in found.items())


def test_an_adapter_that_is_switched_off_or_merged_is_the_base(
    model_of: Callable[[str], Any], products: list[Any]
) -> None:
    model = built(model_of, ACTS["start with values"], plain=False).eval()
    ids = torch.arange(5, 15).view(1, 10)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        count = len(products)
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
    assert len(products) == count
    assert not torch.allclose(base, adapted, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def decoder(kind: str, dtype: torch.dtype) -> Any:
    """A layer of Qwen2-VL's decoder at a 16th of the 7B's width: frozen, with PEFT's LoRA, or with it in one step."""
    widths = {"hidden_size": 224, "intermediate_size": 1184, "num_attention_heads": 7, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    ids = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    config = Qwen2VLTextConfig(**widths, **ids, num_hidden_layers=1, rope_parameters=rope)
    model = Qwen2VLTextModel(config).to(dtype).requires_grad_(False)
    if kind == "frozen":
        return model
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules="embed_tokens"))
    return adapters.with_lora_in_one_step(model, {"peft": "off", "one step": "on"}[kind])


def saved_bytes(model: Any, tokens: int, dtype: torch.dtype) -> int:
    """What autograd keeps for the backward pass in bfloat16 computation, without the model's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    states = torch.randn(1, tokens, 224, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = model.train()(inputs_embeds=states).last_hidden_state
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    out.float().sum().backward()
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_less_than_peft_and_no_copy_of_a_weight(dtype: torch.dtype) -> None:
    """docs/results.md has the bytes at the 7B's width."""
    peft, ours = (saved_bytes(decoder(kind, dtype), 64, dtype) for kind in ("peft", "one step"))
    assert ours < 0.9 * peft
    if dtype is torch.bfloat16:  # float32 weights are copied for a frozen model too
        frozen = saved_bytes(decoder("frozen", dtype), 64, dtype)
        assert ours - frozen < 0.65 * (peft - frozen)
    half = saved_bytes(decoder("one step", dtype), 32, dtype)
    assert ours == pytest.approx(2 * half, rel=1e-3), "something is kept that does not depend on the tokens"


@pytest.mark.parametrize(("setting", "acts"), [("on", True), ("auto", False), ("off", False)])
def test_an_accelerator_gets_it_if_it_is_asked_for(setting: str, acts: bool) -> None:
    """`meta` stands for an accelerator: a device that is no CPU."""
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))
    model = adapters.with_lora_in_one_step(get_peft_model(plain, LoraConfig(target_modules=["0"])), setting)
    assert any(isinstance(module, Fast) for module in model.modules()) is acts
