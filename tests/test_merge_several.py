"""merge.py on several runs: their adapters become one as PEFT itself does it, or an error says which method can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tiny
from adapter_runs import drawn_run
from cells import answers
from grids import sampled
from test_merge import base_of, logits, merged
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ConfigError
from vlmtune.export.options import METHODS, SPARSE
from vlmtune.models.combining import Way, combine
from vlmtune.models.load import load
from vlmtune.models.saved_adapter import load_adapter, load_beside
from vlmtune.prompt.encode import Encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
RunOf = Callable[..., Path]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> RunOf:
    """Runs over one checkpoint, each drawn once."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def make(name: str, seed: int = 0, **fields: Any) -> Path:
        if name not in made:
            drawn_run(folder / name, checkpoint_of("qwen2_vl"), fields, seed=seed)
            made.add(name)
        return folder / name

    return make


def opened(*runs: Path) -> Any:
    """The base with the adapters a, b, ..., by PEFT alone."""
    base, processor = base_of(runs[0])
    model = PeftModel.from_pretrained(base, runs[0] / "model", adapter_name="a")
    for name, run in zip("bcd", runs[1:], strict=False):
        model.load_adapter(run / "model", name)
    return model, Encoder(processor)


def written(folder: Path) -> torch.Tensor:
    """Logits of a merged folder."""
    types = {"dtype": torch.float32, "compute_dtype": torch.float32}
    model, processor = load(ModelConfig(path=str(folder)), tiny.method({}), device=torch.device("cpu"), **types)
    return logits(model, processor)


@pytest.mark.parametrize("method", sampled(METHODS, {"svd", "dare_ties"}))
def test_each_method_gives_what_peft_gives(method: str, run_of: RunOf, tmp_path: Path) -> None:
    a, b = run_of("a"), run_of("b", seed=1)
    sparse = ["density=0.7", "seed=3"] if method in SPARSE else []
    merged(f"runs=[{a},{b}]", "weights=[0.7,0.4]", f"method={method}", *sparse, f"output={tmp_path}/merged")
    model, encoder = opened(a, b)
    torch.manual_seed(3)
    density = {"density": 0.7} if sparse else {}
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type=method, **density)
    model.set_adapter("sum")
    torch.testing.assert_close(
        written(tmp_path / "merged"), answers(model, encoder, tiny.records(4)), rtol=1e-3, atol=1e-3
    )


def combined(runs: list[Path], weights: list[float], way: Way) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the sum of adapters, and of the base with their full updates added one by one."""
    base, processor = base_of(runs[0])
    model = load_adapter(base, runs[0] / "model")
    load_beside(model, runs[1] / "model", "adapter_1")
    combine(model, ["default", "adapter_1"], weights, way, "sum")
    found = logits(model, processor)
    plain, updates = base_of(runs[0])[0], []
    for run, weight in zip(runs, weights, strict=True):
        own = load_adapter(base_of(run)[0], run / "model").merge_and_unload()
        updates.append(
            {name: weight * (p - dict(plain.named_parameters())[name]) for name, p in own.named_parameters()}
        )
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data + sum(update[name] for update in updates)
    return found, logits(plain, processor)


def test_cat_is_the_exact_sum_for_other_ranks_and_modules_and_with_rslora(run_of: RunOf) -> None:
    """PEFT alone would scale a sum of rsLoRA adapters by the root of its rank."""
    for first, second in (
        (run_of("a"), run_of("r4", r=4, target_modules=["k_proj", "q_proj"])),
        (run_of("rs", use_rslora=True), run_of("a")),
    ):
        found, wanted = combined([first, second], [0.7, -0.4], Way("cat"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_ia3_adapters_are_added_by_their_weights(run_of: RunOf, tmp_path: Path) -> None:
    ia3 = {"method": "ia3", "feedforward_modules": ["down_proj"]}
    a, b = run_of("ia3_a", **ia3), run_of("ia3_b", seed=1, **ia3)
    with pytest.raises(ConfigError, match="method=ties: IA3 adapters can only be merged with method=linear"):
        merged(f"runs=[{a},{b}]", "method=ties", f"output={tmp_path}/merged")
    merged(f"runs=[{a},{b}]", f"output={tmp_path}/merged")  # equal weights
    model, encoder = opened(a, b)
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(
        written(tmp_path / "merged"), answers(model, encoder, tiny.records(4)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("fields", "words", "reason"),
    [
        ({"r": 4}, [], r"method=linear: needs adapters of equal rank, and .*/a has r=8, .* has r=4; use cat, svd"),
        ({"r": 4}, ["method=ties"], "method=ties: needs adapters of equal rank"),
        ({"method": "loha"}, [], "several adapters of the method loha can't become one; only those of lora or ia3 can"),
        ({"method": "ia3", "feedforward_modules": ["down_proj"]}, [], "one is lora and one ia3"),
        ({"use_dora": True}, [], "DoRA's magnitudes have no weighted sum"),
        ({"bias": "all"}, [], "the sum would leave out trained biases"),
        ({"init_lora_weights": "pissa"}, [], "it changed the base's weights for itself"),
        ({"modules_to_save": ["merger"]}, [], "adapter.modules_to_save: the sum would leave it out"),
    ],
)
def test_runs_that_cannot_be_merged_say_what_would_work(
    fields: dict[str, Any], words: list[str], reason: str, run_of: RunOf, tmp_path: Path
) -> None:
    a, b = run_of("a"), run_of("b_" + "_".join(fields), seed=1, **fields)
    with pytest.raises(ConfigError, match=reason):
        merged(f"runs=[{a},{b}]", *words, f"output={tmp_path}/merged")
    assert not (tmp_path / "merged").exists()


def test_runs_over_different_bases_are_refused(run_of: RunOf, tmp_path: Path) -> None:
    other = drawn_run(tmp_path / "other", tiny.build("qwen2_vl", tmp_path / "base", seed=5), {})
    with pytest.raises(ConfigError, match="was trained over another base model than"):
        merged(f"runs=[{run_of('a')},{other}]", f"output={tmp_path}/merged")


def test_a_layer_that_the_sum_would_leave_out_is_said(run_of: RunOf) -> None:
    """PEFT takes the excluded modules of the first adapter for all."""
    a = run_of("without_v", exclude_modules=["v_proj"])
    b = run_of("a")
    base, _ = base_of(a)
    model = load_adapter(base, a / "model")
    load_beside(model, b / "model", "adapter_1")
    model.peft_config["default"].exclude_modules = {"v_proj"}
    with pytest.raises(ConfigError, match=r"v_proj: only one of the adapters adapts it"):
        combine(model, ["default", "adapter_1"], [0.5, 0.5], Way("cat"), "sum")


def test_methods_are_ranked_on_rows_and_the_best_is_written(
    run_of: RunOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tiny.write_csv(tmp_path, [("What color?", "Red"), ("How many?", "three"), ("Is it red?", "yes")])
    a, b = run_of("a"), run_of("b", seed=1)
    words = ["methods=[linear,cat,dare_linear]", "density=0.2", f"data.test={table}", "task.metrics=[anls]"]
    found = merged(f"runs=[{a},{b}]", *words, f"output={tmp_path}/merged")
    assert [score.name for score in found.scores] == ["a alone", "b alone", "linear", "cat", "dare_linear", "merged"]
    tried = {score.name: score.metrics for score in found.scores[2:5]}
    assert found.way is not None
    assert tried[found.way.method]["anls"] == max(metrics["anls"] for metrics in tried.values())
    last = found.scores[-1].metrics
    assert last["loss"] == pytest.approx(tried[found.way.method]["loss"], rel=1e-4)
    low, high = found.scores[-1].intervals["anls"]
    assert low <= last["anls"] <= high
