"""A finished run answers in the compute type, without gradients, and with its adapter merged where it's no rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vlmtune
from cells import answers
from grids import sampled
from vlmtune.batching.layout import Layout
from vlmtune.data import table as tables
from vlmtune.errors import ConfigError
from vlmtune.evaluation.evaluate import Evaluation, evaluate
from vlmtune.models.adapters import adapt
from vlmtune.models.load import load
from vlmtune.models.merging import METHODS, merged
from vlmtune.models.parts import find_parts
from vlmtune.predict.predictor import Predictor, answering
from vlmtune.prompt.encode import Encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10, "tinit": 1, "tfinal": 1},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "trainable_tokens": {"token_indices": [*range(10, 100)], "target_modules": None},
}
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "biases": {"bias": "all"},
    "saved modules": {"modules_to_save": ["merger"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "parts": ["language", "head"]},
    "parameters": {"target_parameters": ["q_proj.weight"], "target_modules": []},
    "tokens": {"trainable_token_indices": [*range(10, 100)]},
}
CASES = [*sorted(METHODS), *LORA]
QUICK = {"lora", "ia3", "dora", "saved modules"}
FP32 = {"dtype": torch.float32, "compute_dtype": torch.float32}


@pytest.fixture
def adapted(checkpoint_of: Callable[[str], Path]) -> Callable[..., Any]:
    """A model with an adapter that changes its answers, and its config."""

    def make(family: str, fields: dict[str, Any], types: dict[str, Any] = FP32) -> Any:
        keys = {"method": "lora", "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
        config = tiny.config(checkpoint_of(family), adapter=keys)
        opened, processor = load(config.model, config.quantization, device=torch.device("cpu"), **types)
        model = adapt(opened, config, find_parts(opened)).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return model.requires_grad_(False), config, Encoder(processor)

    return make


@pytest.mark.parametrize("case", sampled(CASES, QUICK))
def test_merged_weights_answer_as_the_adapter_does(adapted: Callable[..., Any], case: str) -> None:
    fields = LORA[case] if case in LORA else {"method": case, **FIELDS.get(case, {})}
    model, config, encoder = adapted("qwen2_vl", fields)
    rows = tiny.records(4)
    before = answers(model, encoder, rows)
    plain = merged(model, config)
    assert not hasattr(plain, "peft_config")
    assert not [name for name, module in plain.named_modules() if hasattr(module, "base_layer")]
    after = answers(plain, encoder, rows)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    base = load(config.model, config.quantization, device=torch.device("cpu"), **FP32)[0]
    assert (answers(base, encoder, rows) - after).norm() > 1e-3 * after.norm()


HALF = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "fields", "types", "reason"),
    [
        ("qwen2_vl", {}, HALF, ""),
        ("qwen2_vl", {"lora_bias": True}, FP32, "only into layers that have a bias"),
        ("qwen2_vl", {"method": "lily"}, FP32, "lily is not known to be mergeable"),
        ("qwen2_vl_tied", {"target_modules": ["embed_tokens"]}, FP32, "shares its weights with another layer"),
    ],
)
def test_an_adapter_is_not_merged_where_that_would_change_answers(
    adapted: Callable[..., Any], family: str, fields: dict[str, Any], types: dict[str, Any], reason: str
) -> None:
    model, config, encoder = adapted(family, fields, types)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert merged(model, config) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    config.generation.merge_adapter = "on"
    if reason:
        with pytest.raises(ConfigError, match=reason):
            merged(model, config)
        return
    wanted = answers(model, encoder, tiny.records(4))
    config.generation.merge_adapter = "off"
    assert merged(model, config) is model
    config.generation.merge_adapter = "on"
    found = answers(merged(model, config), encoder, tiny.records(4))
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_quantized_weights_are_not_merged(checkpoint_of: Callable[[str], Path]) -> None:
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, quantization=tiny.QUANTIZED["nf4"])
    opened, _ = load(config.model, config.quantization, device=torch.device("cpu"), **FP32)
    model = adapt(opened, config, find_parts(opened))
    assert merged(model, config) is model
    config.generation.merge_adapter = "on"
    with pytest.raises(ConfigError, match="the weights are quantized"):
        merged(model, config)


# ---------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Callable[..., Any]:
    """Finished runs of two steps, each trained once: their folder and result."""
    folder = tmp_path_factory.mktemp("trained")
    table = tiny.write_csv(folder, [(f"what is {i}?", ("red", "a blue circle")[i % 2]) for i in range(10)], per_image=3)
    found: dict[str, Any] = {}

    def train(adapter: str, precision: str) -> Any:
        name = f"{adapter}_{precision}"
        if name not in found:
            model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", f"adapter={adapter}"]
            data = ["data=csv", f"data.train={table}", f"data.validation={table}", "data.cache_features=off"]
            steps = ["trainer.max_steps=2", "trainer.batch_size=4", "trainer.learning_rate=1e-2", "tracker=none"]
            fixed = [f"trainer.precision={precision}", "trainer.share_prefix=off", "trainer.eval_batch_size=4"]
            more = ["generation.max_new_tokens=4", "trainer.eval_baseline=false", f"hydra.run.dir={folder / name}"]
            result = vlmtune.train([*model, *data, *steps, *fixed, *more])
            found[name] = (folder / name, {key.removeprefix("eval/"): v for key, v in result["metrics"].items()})
        return found[name]

    return train


def scored(run: Path, *overrides: str) -> tuple[Predictor, Evaluation]:
    predictor = vlmtune.load(run, overrides=overrides)
    config = predictor.config
    rows = tables.load(config.data, config.task, config.trainer.seed)["validation"].records
    with predictor.at_work():
        found = evaluate(predictor.model, predictor.encoder, rows, config, predictor.engine, title="", layout=Layout())
    return predictor, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "precision", "overrides"),
    [
        ("none", "bf16", ["model.dtype=fp32"]),
        pytest.param("none", "fp32", [], marks=pytest.mark.slow),
        pytest.param("lora", "bf16", [], marks=pytest.mark.slow),
    ],
)
def test_a_run_is_scored_afterwards_as_it_was_in_training(
    trained: Callable[..., Any], adapter: str, precision: str, overrides: list[str]
) -> None:
    """Bit by bit, in the data types of the run and with the adapter's own layers; bf16 weights are not merged."""
    run, metrics = trained(adapter, precision)
    predictor, found = scored(run, *overrides)
    assert found.metrics == metrics
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())


@pytest.mark.slow
def test_weights_that_were_trained_in_fp32_answer_in_bf16(trained: Callable[..., Any]) -> None:
    """Half the memory; up to rounding what the run computed."""
    run, metrics = trained("none", "bf16")
    predictor, found = scored(run)
    assert {parameter.dtype for parameter in predictor.model.parameters()} == {torch.bfloat16}
    assert found.metrics["loss"] == pytest.approx(metrics["loss"], rel=2e-2)
    assert found.metrics["loss"] != metrics["loss"]


def test_a_merged_run_answers_as_before_and_its_files_stay(trained: Callable[..., Any]) -> None:
    run, metrics = trained("lora", "fp32")

    def contents() -> dict[Path, str]:
        files = [path for path in (run / "model").rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    predictor, found = scored(run)
    assert not hasattr(predictor.model, "peft_config")
    assert found.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    unmerged = scored(run, "generation.merge_adapter=off")[1]
    assert unmerged.metrics == metrics
    assert unmerged.predictions == found.predictions
    assert contents() == before


def test_only_bf16_lowers_the_type_of_weights() -> None:
    config = tiny.config(None)
    config.model.dtype = "auto"
    for compute, wanted in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        assert answering({"dtype": torch.float32, "compute_dtype": compute}, config)["dtype"] == wanted
    half = {"dtype": torch.float32, "compute_dtype": torch.float16}
    assert answering(half, config) == half
    config.model.dtype = "fp32"
    asked = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    assert answering(asked, config) == asked
