"""What an adapter trains is what plain PEFT trains with the same fields, inside `adapter.parts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import Linear
from peft.utils import PeftType

import tiny
from grids import thinned
from vlmtune.config import fields as known_fields
from vlmtune.config import peft_fields
from vlmtune.errors import ConfigError
from vlmtune.models import adapters, peft_config, saved_adapter
from vlmtune.models.parts import find_parts
from vlmtune.training.model_folder import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of CUDA extensions, of merging
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

WHOLE = ["vision", "projector", "language", "head"]
SMALL: dict[str, dict[str, Any]] = {  # what a model of 64 channels needs, or the method itself
    "adalora": {"total_step": 10, "tinit": 1, "tfinal": 1},
    "c3a": {"block_size": 16},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [3, 5]},
    "vblora": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "waveft": {"n_frequency": 50},
}
LAYERED = {"target_modules": ["q_proj", "v_proj"]}
LINEAR = {"target_modules": "all-linear"}
LORA: dict[str, dict[str, Any]] = {
    "layers": {**LAYERED, "layers_to_transform": [1]},
    "one layer": {**LAYERED, "layers_to_transform": 0},
    "layers of a kind": {**LAYERED, "layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded names": {**LINEAR, "exclude_modules": ["q_proj", "up_proj"]},
    "excluded expression": {**LINEAR, "exclude_modules": r".*layers\.0\..*"},
    "ranks": {**LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 3}},
    "alphas": {**LINEAR, "alpha_pattern": {"v_proj": 2}},
    "all biases": {**LINEAR, "bias": "all"},
    "its biases": {**LINEAR, "bias": "lora_only"},
    "bias of B": {**LINEAR, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "parameters": {"target_parameters": ["q_proj.weight"]},
    "parameters and modules": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    "tokens": {**LINEAR, "trainable_token_indices": [3, 4]},
    "module beside": {**LINEAR, "modules_to_save": ["embed_tokens"]},
    "dora": {**LINEAR, "use_dora": True},
    "rslora": {**LINEAR, "use_rslora": True},
    "dropout": {**LINEAR, "lora_dropout": 0.3},
    "expression": {"target_modules": r".*layers\.1\..*(q_proj|fc1)"},
    "olora": {**LINEAR, "init_lora_weights": "olora"},
    "gaussian": {**LINEAR, "init_lora_weights": "gaussian"},
    "pissa": {**LINEAR, "init_lora_weights": "pissa"},
    "velora": {**LINEAR, "velora_config": {}},
}
ADAPTER_FIELDS = known_fields.known("adapter")
REFUSED = [m for m, f in ADAPTER_FIELDS.items() if m in peft_fields.METHODS or "num_virtual_tokens" in f]
METHODS = [method for method in ADAPTER_FIELDS if method not in REFUSED]


def fields_of(method: str) -> dict[str, Any]:
    targets = {} if method == "trainable_tokens" else LINEAR
    return {"method": method, **targets, **SMALL.get(method, {})}


def plain(model: Any, fields: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    rest = {key: value for key, value in fields.items() if key != "method"}
    return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(fields["method"].upper())](**rest))


def ours(model: Any, fields: dict[str, Any], scope: list[str]) -> Any:
    parts = find_parts(model)
    torch.manual_seed(1)
    config = tiny.config(None, adapter={**fields, "parts": scope})
    return adapters.adapt(model, config, parts)


def trained(model: Any, scope: list[str] = WHOLE) -> dict[str, tuple[int, ...]]:
    """Shapes of what trains in the layers, under every name that a shared tensor has there."""
    parts = find_parts(model.get_base_model())
    named = model.named_parameters(remove_duplicate=False)
    return {n: tuple(p.shape) for n, p in named if p.requires_grad and parts.of(n) in scope and ".model." in n}


def values_after_steps(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What trains, after two steps of plain gradient descent on all positions."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), 0.1)
    model.train()
    torch.manual_seed(2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).logits.float().pow(2).mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 17).view(2, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check(model_of: Callable[[str], Any], fields: dict[str, Any], scope: list[str]) -> None:
    family = "qwen2_vl" if "bias" in fields else "llava"  # whose language model has biases
    alone = {"target_modules": r".*language_model\.layers.*_proj"} if fields["method"] == "tinylora" else {}
    try:  # TinyLoRA spreads its weights over all targets, so those of plain PEFT must be the same ones
        wanted = trained(plain(model_of(family), {**fields, **alone}), scope)
    except ImportError as error:
        with pytest.raises(ConfigError, match=str(error).partition(" ")[0]):
            ours(model_of(family), fields, scope)
        return
    found = ours(model_of(family), fields, scope)
    assert wanted
    assert trained(found) == wanted


@pytest.mark.parametrize("method", thinned(METHODS, 12))
def test_every_method_trains_what_peft_trains_in_the_language_model(
    model_of: Callable[[str], Any], method: str
) -> None:
    check(model_of, fields_of(method), ["language"])


@pytest.mark.parametrize("name", thinned(LORA, 8))
def test_every_field_of_lora_chooses_what_peft_chooses(model_of: Callable[[str], Any], name: str) -> None:
    check(model_of, {"method": "lora", **LORA[name]}, ["language"])


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("loha", {**LAYERED, "layers_to_transform": [1], "rank_pattern": {"q_proj": 2}}),
        ("hra", {**LINEAR, "exclude_modules": ["q_proj"]}),
        ("boft", {**LINEAR, "bias": "all"}),
        ("vera", {**LAYERED, "r": 8, "layers_to_transform": [0]}),
        ("ia3", {"target_modules": r".*(k_proj|fc1)", "feedforward_modules": r".*fc1"}),
    ],
)
@pytest.mark.parametrize("scope", [WHOLE, ["language"], ["vision", "projector"]], ids=" ".join)
def test_fields_of_other_methods_too(
    model_of: Callable[[str], Any], method: str, fields: dict[str, Any], scope: list[str]
) -> None:
    if method == "ia3" and scope == ["language"]:
        pytest.skip("fc1 is in vision: refused, see below")
    check(model_of, {"method": method, **fields}, scope)


MORE: list[tuple[str, dict[str, Any]]] = [
    ("lora", {**LAYERED, "modules_to_save": ["model.language_model.norm"]}),
    ("lora", {**LINEAR, "trainable_token_indices": {"embed_tokens": [3, 4]}}),
    ("lora", {**LINEAR, "init_lora_weights": "orthogonal", "r": 4}),
    ("lora", {**LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*q_proj": 5}}),
    ("lora", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("adalora", {**LAYERED, "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 20}),
    ("boft", {**LAYERED, "boft_block_num": 4, "boft_block_size": 0}),
    ("c3a", {**LAYERED, "block_size": 16, "block_size_pattern": {"q_proj": 32}}),
    ("hra", {**LAYERED, "r": 4, "apply_GS": True, "bias": "hra_only"}),
    (
        "ia3",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    ),
    ("ln_tuning", {"target_modules": ["input_layernorm"]}),
    ("lokr", {**LAYERED, "init_weights": "lycoris", "decompose_both": True, "r": 2}),
    ("miss", {**LAYERED, "r": 16, "mini_r": 4, "init_weights": "mini"}),
    ("oft", {**LAYERED, "oft_block_size": 16, "coft": True, "block_share": True}),
    ("randlora", {**LAYERED, "r": 8, "sparse": True, "projection_prng_key": 3}),
    ("road", {**LAYERED, "variant": "road_2", "group_size": 16}),
    ("shira", {**LAYERED, "r": 2, "random_seed": 7}),
    ("vera", {**LAYERED, "projection_prng_key": 5, "save_projection": False, "r": 4, "d_initial": 0.5}),
]
"""Fields of which each one changes values, and not what trains alone."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fields"), MORE, ids=[f"{method} {'+'.join(fields)}" for method, fields in MORE])
def test_more_fields_step_as_plain_peft(
    model_of: Callable[[str], Any], batch: dict[str, torch.Tensor], method: str, fields: dict[str, Any]
) -> None:
    fields = {"method": method, **fields}
    one, other = plain(model_of("qwen2_vl"), fields), ours(model_of("qwen2_vl"), fields, WHOLE)
    assert trained(other) == trained(one)
    wanted, found = values_after_steps(one, batch), values_after_steps(other, batch)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def test_a_method_that_saves_too_little_to_go_on_from_is_refused() -> None:
    fields = {"method": "vblora", "parts": ["language"], "save_only_topk_weights": True}
    (problem,) = peft_fields.problems(tiny.method(fields), bits=None)
    assert problem == "adapter.save_only_topk_weights: saves too little of VB-LoRA to resume from; leave it out"


@pytest.mark.parametrize(
    "name", thinned(["layers", "ranks", "its biases", "all biases", "dora", "rslora", "dropout", "tokens"], 3)
)
def test_steps_are_those_of_plain_peft(
    model_of: Callable[[str], Any], batch: dict[str, torch.Tensor], name: str
) -> None:
    """LoRA in one step of autograd is only taken where it is the same: not over biases that train."""
    fields = {"method": "lora", "r": 4, **LORA[name]}
    wanted = values_after_steps(plain(model_of("qwen2_vl"), fields), batch)
    found = values_after_steps(ours(model_of("qwen2_vl"), fields, WHOLE), batch)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_and_is_saved_as_plain_peft(
    model_of: Callable[[str], Any], encoder_of: Any, batch: dict[str, torch.Tensor], tmp_path: Path, method: str
) -> None:
    fields = fields_of(method)
    try:
        wanted = values_after_steps(plain(model_of("qwen2_vl"), fields), batch)
    except ImportError:
        return  # `check` shows that it is refused
    model = ours(model_of("qwen2_vl"), fields, WHOLE)
    found = values_after_steps(model, batch)
    assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in wanted.items())
    check_saved(model, model_of, encoder_of, batch, tmp_path)


def check_saved(model: Any, model_of: Any, encoder_of: Any, batch: dict[str, torch.Tensor], folder: Path) -> None:
    save_model(model, encoder_of("qwen2_vl").processor, folder / "model")
    again = saved_adapter.load_adapter(model_of("qwen2_vl"), folder / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    "name", ["layers", "its biases", "module beside", "tokens", "olora", "parameters", "embedding"]
)
def test_what_is_saved_loads_equal(
    model_of: Callable[[str], Any], encoder_of: Any, batch: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    model = ours(model_of("qwen2_vl"), {"method": "lora", "r": 4, **LORA[name]}, ["language"])
    values_after_steps(model, batch)
    check_saved(model, model_of, encoder_of, batch, tmp_path)


@pytest.mark.parametrize("method", ["unilora", "glora", "tinylora"])
def test_methods_that_name_their_weights_unusually_are_saved(
    model_of: Callable[[str], Any], encoder_of: Any, batch: dict[str, torch.Tensor], tmp_path: Path, method: str
) -> None:
    model = ours(model_of("qwen2_vl"), fields_of(method), ["language"])
    values_after_steps(model, batch)
    check_saved(model, model_of, encoder_of, batch, tmp_path)


def test_a_module_beside_the_adapter_trains_wherever_it_is(model_of: Callable[[str], Any]) -> None:
    fields = {"method": "lora", **LAYERED, "modules_to_save": "multi_modal_projector"}  # a bare name
    names = trained(ours(model_of("llava"), fields, ["language"]))
    beside = {name for name in names if "lora_" not in name}
    assert len(beside) == 4  # weight and bias of both layers
    assert all("multi_modal_projector" in name for name in beside)


def test_a_bare_word_is_a_name(model_of: Callable[[str], Any]) -> None:
    bare = trained(ours(model_of("llava"), {"method": "lora", "target_modules": "q_proj"}, ["language"]))
    listed = trained(ours(model_of("llava"), {"method": "lora", "target_modules": ["q_proj"]}, ["language"]))
    assert bare == listed
    assert len(bare) == 4
    fields = {"method": "lora", **LINEAR, "exclude_modules": "q_proj"}
    assert not [name for name in trained(ours(model_of("llava"), fields, ["language"])) if "q_proj" in name]


def test_one_step_is_taken_and_steps_aside(model_of: Callable[[str], Any], batch: dict[str, torch.Tensor]) -> None:
    """The comparisons above would hold too if it never acted."""
    model = ours(model_of("qwen2_vl"), {"method": "lora", **LAYERED}, ["language"])
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    x = torch.randn(2, 3, 64, requires_grad=True)
    assert "LoraProduct" in type(layer(x).grad_fn).__name__ + str(layer(x).grad_fn.next_functions)
    layer.base_layer.bias.requires_grad_(True)
    assert "LoraProduct" not in type(layer(x).grad_fn).__name__ + str(layer(x).grad_fn.next_functions)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_more_are_refused_at_the_start(method: str) -> None:
    (problem,) = peft_fields.problems(tiny.method({"method": method, "parts": ["language"]}), bits=None)
    assert problem.startswith(f"adapter.method={method}: ")
    assert problem.endswith("use another method, for instance lora")


def test_nothing_else_is_refused() -> None:
    assert not [m for m in METHODS if peft_fields.problems(tiny.method(fields_of(m)), bits=None)]
    assert len(METHODS) > 30
    assert "prefix_tuning" in REFUSED


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LAYERED, "layers_to_transform": [1, 9]}, "layers_to_transform: no target in language is in a layer 9"),
        ({**LINEAR, "exclude_modules": ["qq_proj"]}, "exclude_modules: qq_proj matches nothing in .*; did you mean"),
        ({**LINEAR, "modules_to_save": ["merger"]}, "modules_to_save: merger matches nothing in"),
        ({**LINEAR, "rank_pattern": {"fc1": 2}}, "rank_pattern: fc1 is not a target in language"),
        ({"target_parameters": ["qq.weight"]}, r"target_parameters: qq\.weight matches nothing in language"),
        ({**LINEAR, "exclude_modules": r".*layers.*"}, "nothing in language is left for an adapter"),
        ({"target_modules": []}, "target_modules: is empty; give all-linear"),
        ({"target_modules": "q_proj, v_proj"}, r"write a list in brackets: \[q_proj,v_proj\]"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": [3]}, "should be a valid string"),
        ({}, "target_modules: missing; PEFT has no default of lora for llava. Give all-linear"),
        ({"target_modules": ["o_proj"], "bias": "lora_only"}, "bias=lora_only: no layer with an adapter in language"),
        ({**LINEAR, "bias": "boft_only"}, "adapter.bias=boft_only: "),
        ({**LINEAR, "use_dora": "maybe"}, "adapter.use_dora=maybe: Input should be a valid boolean"),
        ({**LINEAR, "r": 4.5}, r"adapter\.r=4\.5: "),
        ({**LINEAR, "runtime_config": {"zzz": True}}, r"adapter\.runtime_config\.zzz: no such key"),
        ({**LINEAR, "eva_config": {"rho": 2.0}}, "`eva_config` specified but will be ignored"),
        ({**LINEAR, "fan_in_fan_out": True}, "Setting fan_in_fan_out to False"),
        ({**LINEAR, "ensure_weight_tying": True}, "input and output embedding of this model are not tied"),
        ({**LINEAR, "layer_replication": [[0, 1], [0, 2]]}, "PEFT refuses it here: Could not locate the layers"),
    ],
)
def test_a_field_without_effect_is_refused(
    model_of: Callable[[str], Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(model_of("llava"), {"method": "lora", **fields}, ["language"])


def test_off_is_no() -> None:
    """PEFT takes any text for true."""
    assert peft_config.peft_config("lora", {"use_dora": "off"}).use_dora is False


@pytest.mark.parametrize("method", METHODS)
def test_every_default_of_peft_is_of_its_fields_type(method: str) -> None:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    wrong: list[str] = []
    for key in ADAPTER_FIELDS[method]:
        if key in defaults:
            peft_config._typed(cls, key, defaults[key], wrong)
    assert wrong == []


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"init_lora_weights": "eva"}, "needs a pass over the data"),
        ({"init_lora_weights": "pissa_niter_4"}, "use pissa"),
        ({"kasa_config": {}, "megatron_core": "megatron.core"}, "is for models with Megatron layers"),
        ({"alora_invocation_tokens": [1]}, "is only read by PEFT's text models"),
    ],
)
def test_fields_that_a_run_can_not_follow(fields: dict[str, Any], wanted: str) -> None:
    assert wanted in peft_fields.problems(tiny.method({"method": "lora", **fields}), bits=None)[-1]


def test_a_part_that_the_model_lacks(model_of: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.parts: cross_attention: this model has no such part"):
        ours(model_of("llava"), {"method": "lora", **LINEAR}, ["language", "cross_attention"])
    model = model_of("qwen2_vl_tied")
    with pytest.raises(ConfigError, match=r"model\.freeze: head: this model has no such part \(its head is the input"):
        adapters.adapt(model, tiny.config(None, model={"freeze": ["head"]}), find_parts(model))


def test_a_part_that_gets_nothing_is_told(model_of: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    ours(model_of("llava"), {"method": "lora", **LAYERED}, ["language", "projector"])
    assert "adapter.target_modules matches nothing in projector" in caplog.text
