"""A sharded model trains, evaluates, saves and resumes as one process does with the whole of it.

One launch of two ranks does the usual things with all weights, on rows with and without images. The slow tests hold
other adapters, types, optimizers, families and numbers of ranks against runs of one process.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

import forked
import tiny
import tiny_families
import vlmtune
from fake_ranks import first_of_two
from runs import losses
from test_two_ranks import answers
from vlmtune.config import compose
from vlmtune.config.schema import ShardingConfig
from vlmtune.data.splits import RecordList
from vlmtune.errors import ConfigError
from vlmtune.evaluation import evaluate
from vlmtune.launch import session
from vlmtune.launch.world import World
from vlmtune.models import sharding
from vlmtune.models.parts import base_of
from vlmtune.objectives import next_token

pytestmark = pytest.mark.xdist_group("forked")  # one worker: one process imports everything

Make = Callable[..., list[str]]
FULL = ("adapter=none", "trainer.learning_rate=1e-3", "optimizer.weight_decay=0.1", "trainer.batch_size=1")
FSDP = "sharding=fsdp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], folder: Path) -> Make:
    """22 rows, every third without an image, in steps of 8: the last step of an epoch is short of rows."""
    rows = [(f"what is number {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(22)]
    head, *lines = tiny.write_csv(folder, rows, per_image=3).read_text().splitlines()
    mixed = folder / "mixed.csv"
    lines = [line if i % 3 else "," + line.partition(",")[2] for i, line in enumerate(lines)]
    mixed.write_text("\n".join([head, *lines]) + "\n")

    def make(name: str, *more: str, family: str = "qwen2_vl", table: str = "mixed.csv", steps: int = 6) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of(family)}", "generation.max_new_tokens=4"]
        data = ["data=csv", f"data.train={folder / table}", f"data.validation={folder / table}", "tracker=none"]
        trained = ["trainer.batch_size=4", "trainer.rows_per_step=8", f"trainer.max_steps={steps}"]
        rates = ["trainer.learning_rate=1e-2", "trainer.scheduler.name=constant", "trainer.scheduler.warmup_fraction=0"]
        logged = ["trainer.log_every=1", "trainer.eval_baseline=false", "trainer.eval_batch_size=2"]
        seen = ["data.max_eval_rows=5", "trainer.eval_every=3", "trainer.save_every=3", "trainer.share_prefix=off"]
        return [*model, *data, *trained, *rates, *logged, *seen, *more, f"hydra.run.dir={folder / name}"]

    return make


def together(jobs: Sequence[Sequence[str]], folder: Path, count: int = 2) -> None:
    """Run one job after the other on the same ranks."""
    forked.as_ranks(count, folder / "ranks.log", train, jobs)


def train(jobs: Sequence[Sequence[str]]) -> None:
    """One rank's part, with logits of four tokens at a time in a job whose folder is named so."""
    evaluate.ROUND = 1  # one rank has a batch more than the other
    usual = next_token.MOST_LOGITS
    for words in jobs:
        next_token.MOST_LOGITS = 2000 if "chunked" in words[-1] else usual
        vlmtune.train(words)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(run: Path, other: Path, *, loss: float = 2e-6, weights: float = 1e-4) -> None:
    """Losses, answers, metrics, checkpoint and model of two runs, up to float32's order of sums.

    AdamW's first steps are as long for a small gradient as for a large one, so weights differ by more than losses.
    """
    assert losses(run) == pytest.approx(losses(other), abs=loss)
    assert answers(run) == answers(other)
    found, expected = (json.loads((each / "result.json").read_text()) for each in (run, other))
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=10 * loss)
    for place in ("model", "checkpoints/step_000006"):
        own, whole = (tensors(each / place) for each in (run, other))
        assert own.keys() == whole.keys()
        for name, tensor in whole.items():
            assert own[name].dtype == tensor.dtype
            torch.testing.assert_close(own[name], tensor, rtol=0, atol=weights, msg=f"{place}: {name}")
    assert files(run / "model") == files(other / "model")
    assert files(run / "checkpoints") == files(other / "checkpoints")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def two(overrides: Make, folder: Path) -> Path:
    """Runs of two ranks: six steps, and three and later three more."""
    jobs = [
        overrides("straight", FSDP, *FULL),
        overrides("resumed", FSDP, *FULL, steps=3),
        [f"resume={folder / 'resumed'}", "trainer.max_steps=6"],
    ]
    together(jobs, folder)
    return folder


@pytest.fixture(scope="module")
def one(overrides: Make, folder: Path) -> Path:
    """The run of six steps by one process, which has nothing to share."""
    vlmtune.train(overrides("one", FSDP, *FULL))
    return folder / "one"


def test_two_ranks_with_shares_do_what_one_process_does(two: Path, one: Path) -> None:
    """Micro-batches of one row, some with an image and some without; five rows to evaluate, in batches of two."""
    assert_same(two / "straight", one)


def test_a_resumed_run_is_the_straight_one_bit_by_bit(two: Path) -> None:
    assert_same(two / "resumed", two / "straight", loss=0, weights=0)


def half_done(folder: Path, name: str) -> Path:
    """The run of two ranks as it was after three steps."""
    run = folder / name
    shutil.copytree(folder / "straight", run)
    shutil.rmtree(run / "checkpoints" / "step_000006")
    shutil.rmtree(run / "model")
    return run


def test_one_process_goes_on_where_two_ranks_stopped(two: Path, one: Path) -> None:
    vlmtune.train([f"resume={half_done(two, 'alone')}"])
    assert_same(two / "alone", one)


def test_the_saved_model_opens_with_transformers(two: Path, one: Path) -> None:
    from transformers import AutoModelForImageTextToText

    opened = AutoModelForImageTextToText.from_pretrained(two / "straight" / "model", dtype="auto")
    assert type(opened).__name__ == "Qwen2VLForConditionalGeneration"
    saved = tensors(two / "straight" / "checkpoints" / "step_000006")
    own = dict(opened.named_parameters())
    assert own
    assert all(torch.equal(saved[name], parameter) for name, parameter in own.items())
    for name in ("config.json", "generation_config.json"):
        assert (two / "straight" / "model" / name).read_text() == (one / "model" / name).read_text()


def test_a_finished_run_answers(two: Path) -> None:
    rows = pd.read_csv(two / "mixed.csv")[:5]
    rows["image_path"] = [path if pd.isna(path) else str(two / path) for path in rows["image_path"]]
    found = vlmtune.load(two / "straight").predict(rows)
    assert list(found["answer_predictions"]) == answers(two / "straight")


# ---------------------------------------------------------------- more of the same, slowly

ALL = "adapter.parts=[vision,projector,language]"
CASES: dict[str, tuple[str, ...]] = {
    "lora": (),
    "lora_everywhere": (ALL, "adapter.target_modules=all-linear", "trainer.gradient_checkpointing=true"),
    "chunked": ("sharding.reshard_after_forward=false",),
    "chunked_full": FULL,
    "frozen_tower": ("adapter=none", "model.freeze=[vision]", "trainer.learning_rate=1e-3"),
    "kept_on_cpu": ("sharding.cpu_offload=true", "adapter=dora"),
    "best": ("trainer.best_metric=eval/loss", "trainer.eval_every=2", "adapter=vera"),
    "saved_modules": ("adapter.modules_to_save=[lm_head]", "adapter.parts=[language,head]", "adapter.bias=all"),
    "embedding": ("adapter.target_modules=[q_proj,embed_tokens]", "trainer.nonfinite=skip"),
    "nf4": ("quantization=nf4",),
}
"""Runs of two ranks that equal those of one, by what they change."""


@pytest.fixture(scope="module")
def cases(overrides: Make, folder: Path) -> Path:
    together([overrides(name, FSDP, *words) for name, words in CASES.items()], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_trains_on_one_process_trains_on_shares(
    cases: Path, overrides: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "chunked" in name:
        monkeypatch.setattr(next_token, "MOST_LOGITS", 2000)
    vlmtune.train(overrides(f"{name}_alone", *(word for word in CASES[name] if not word.startswith("sharding."))))
    assert_same(cases / name, cases / f"{name}_alone")


@pytest.mark.slow
def test_the_saved_adapter_opens_with_peft(cases: Path, checkpoint_of: Callable[[str], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(checkpoint_of("qwen2_vl"))
    opened = PeftModel.from_pretrained(base, cases / "lora" / "model")
    own, saved = dict(opened.named_parameters()), tensors(cases / "lora" / "checkpoints" / "step_000006")
    trained = [name for name in own if "lora_" in name]
    assert trained
    assert all(torch.equal(own[name], saved[name]) for name in trained)


NEAR: dict[str, tuple[str, ...]] = {
    "bf16_weights": ("model.dtype=bf16", "optimizer.rounding=nearest", *FULL),
    "in_bf16": ("trainer.precision=bf16",),
    "muon": ("optimizer=muon", *FULL),
}
"""What rounds to bf16, so that the order of sums shows: held against two ranks that each have the whole model."""
ROUNDED = ("model.dtype=bf16", *FULL)


@pytest.fixture(scope="module")
def rounded(overrides: Make, folder: Path) -> Path:
    """Each of `NEAR` with shares and without, and bf16 weights that are rounded at random: six steps, twice three."""
    jobs = [overrides(name, FSDP, *words) for name, words in NEAR.items()]
    jobs += [overrides(f"{name}_whole", *words) for name, words in NEAR.items()]
    jobs += [overrides("rounded", FSDP, *ROUNDED), overrides("rounded_on", FSDP, *ROUNDED, steps=3)]
    together([*jobs, [f"resume={folder / 'rounded_on'}", "trainer.max_steps=6"]], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR)
def test_what_rounds_to_bf16_stays_near_the_whole_model_on_two_ranks(rounded: Path, name: str) -> None:
    assert losses(rounded / name) == pytest.approx(losses(rounded / f"{name}_whole"), abs=5e-3)


@pytest.mark.slow
def test_weights_that_are_rounded_at_random_resume_bit_by_bit(rounded: Path) -> None:
    """Each rank draws noise of its own for its share."""
    assert_same(rounded / "rounded_on", rounded / "rounded", loss=0, weights=0)
    first = tensors(rounded / "rounded" / "checkpoints" / "step_000003")
    last = tensors(rounded / "rounded" / "checkpoints" / "step_000006")
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in last.items() if name.endswith("q_proj.weight"))
    assert any(not torch.equal(first[name], last[name]) for name in first)


RESIZED = {"onto_four": (4, "sharding.name=fsdp"), "without_shares": (2, "sharding.name=none")}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIZED)
def test_a_sharded_run_resumes_on_other_ranks_and_without_shares(two: Path, one: Path, name: str) -> None:
    count, word = RESIZED[name]
    together([[f"resume={half_done(two, name)}", word]], two, count)
    assert_same(two / name, one)


@pytest.mark.slow
def test_a_run_without_shares_resumes_with_them(overrides: Make, folder: Path, one: Path) -> None:
    vlmtune.train(overrides("whole_half", *FULL, steps=3))
    words = [f"resume={folder / 'whole_half'}", "trainer.max_steps=6", "sharding.name=fsdp"]
    together([words], folder)
    assert_same(folder / "whole_half", one)


FAMILIES = [*tiny.FAMILIES, *tiny.VARIANTS, *tiny_families.FAMILIES]
ONLY_IMAGES = ("paligemma2",)
"""Families that refuse rows without one."""


@pytest.fixture(scope="module")
def families(overrides: Make, folder: Path) -> Path:
    together([[*of_family(overrides, name), FSDP] for name in FAMILIES], folder)
    return folder


def of_family(overrides: Make, name: str, suffix: str = "") -> list[str]:
    table = "rows.csv" if name in ONLY_IMAGES else "mixed.csv"
    return overrides(f"{name}{suffix}", *FULL, "trainer.save_every=null", family=name, table=table, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_all_weights_on_rows_with_and_without_images(
    families: Path, overrides: Make, name: str
) -> None:
    vlmtune.train(of_family(overrides, name, "_alone"))
    found, alone = families / name, families / f"{name}_alone"
    assert losses(found) == pytest.approx(losses(alone), abs=2e-6)
    own, whole = tensors(found / "model"), tensors(alone / "model")
    assert own.keys() == whole.keys()
    assert max(float((own[key] - whole[key]).abs().max()) for key in whole) < 1e-4


# ---------------------------------------------------------------- one of two ranks, played alone


@pytest.fixture
def ranks() -> Iterator[Any]:
    with first_of_two() as engine:
        yield engine


def shard(model: Any, config: ShardingConfig, ranks: Any) -> None:
    sharding.shard(model, config, None, RecordList([]), ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_of_tower_and_language_model_is_a_unit(ranks: Any, model_of: Any, family: str) -> None:
    model = model_of(family)
    expected = [*model.get_decoder().layers]
    names = ("VisionBlock", "EncoderLayer", "VisionLayer")
    expected += [m for m in model.get_encoder(modality="image").modules() if type(m).__name__.endswith(names)]
    assert len(expected) >= 4
    shard(model, ShardingConfig("fsdp"), ranks)
    assert all(isinstance(unit, FSDPModule) for unit in [*expected, model])
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert len(parameter.to_local()) == -(-len(parameter) // 2)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_units_are_made_as_the_config_says(
    ranks: Any, model_of: Any, monkeypatch: pytest.MonkeyPatch, offload: bool, reshard: bool
) -> None:
    """The rest of the model, which comes last, is needed again at once in the backward pass."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(sharding, "fully_shard", lambda unit, **options: made.append(options))
    shard(model_of("llava"), ShardingConfig("fsdp", offload, reshard), ranks)
    assert [options["reshard_after_forward"] for options in made] == [reshard] * (len(made) - 1) + [None]
    assert all(isinstance(options["offload_policy"], CPUOffloadPolicy) == offload for options in made)


def test_one_process_has_nothing_to_share(ranks: Any, model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    ranks.num_processes = 1
    model = model_of("llava")
    with caplog.at_level("INFO", "vlmtune"):
        shard(model, ShardingConfig("fsdp"), ranks)
    assert "one process keeps all weights" in caplog.text
    assert not sharding.is_sharded(model)


def with_batch_norm(model: Any, ranks: Any) -> None:
    model.add_module("norm", nn.BatchNorm1d(4))


def with_two_types(model: Any, ranks: Any) -> None:
    model.get_decoder().norm.to(torch.bfloat16)


def with_integers(model: Any, ranks: Any) -> None:
    model.add_module("stored", nn.Linear(4, 4, bias=False))
    model.stored.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


def with_a_weight_of_two_blocks(model: Any, ranks: Any) -> None:
    first, second, *_ = model.get_decoder().layers
    second.input_layernorm = first.input_layernorm


def with_a_scaler(model: Any, ranks: Any) -> None:
    ranks.scaler = object()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_batch_norm, "batch norm"),
        (with_two_types, "these have bfloat16 and float32"),
        (with_integers, "stored quantized"),
        (with_a_weight_of_two_blocks, "several blocks"),
        (with_a_scaler, "fp16"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused(
    ranks: Any, model_of: Any, change: Callable[[Any, Any], None], said: str
) -> None:
    model = model_of("llava")
    change(model, ranks)
    with pytest.raises(ConfigError, match=rf"sharding=fsdp: [^\n]*{said}"):
        shard(model, ShardingConfig("fsdp"), ranks)
    assert not sharding.is_sharded(model)


def test_a_weight_outside_the_model_is_refused(ranks: Any, model_of: Any) -> None:
    """Such as the bank of vectors that VB-LoRA keeps beside the layers: no unit would average its gradient."""
    around = nn.Module()
    around.inner, around.bank = model_of("llava"), nn.Parameter(torch.zeros(2))
    around.get_base_model = lambda: around.inner  # type: ignore[assignment]
    assert base_of(around) is around.inner
    with pytest.raises(ConfigError, match="several blocks or to none"):
        shard(around, ShardingConfig("fsdp"), ranks)


def test_a_model_without_blocks_is_refused(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="knows no blocks of Linear"):
        shard(nn.Linear(2, 2), ShardingConfig("fsdp"), ranks)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sharding=fsdp", "trainer.precision=fp16"], "sharding=fsdp: fp16 would leave a step out"),
        (["sharding=fsdp", "adapter=adalora"], "AdaLoRA"),
        (["sharding=fsdp", "optimizer=adamw_8bit"], "optimizer.name=adamw_8bit: takes whole tensors"),
        (["sharding=fsdp", "optimizer=paged_adamw"], "optimizer.name=paged_adamw: takes whole tensors"),
        (["sharding=fsdp", "optimizer.offload=true"], "sharding.cpu_offload=true"),
        (["sharding=fsdp", "sharding.cpu_offload=true", "optimizer=muon"], "sharding.cpu_offload: its matrix"),
        (["sharding=fsdp", "quantization=int8"], "use quantization=nf4"),
        (["sharding=fsdp", "quantization=nf4", "quantization.bnb_4bit_quant_storage=uint8"], "leave it out"),
        (["sharding.cpu_offload=true"], "sharding.cpu_offload: is for sharding=fsdp"),
        (["sharding.reshard_after_forward=false"], "sharding.reshard_after_forward: is for sharding=fsdp"),
    ],
)
def test_what_the_config_shows_is_refused_at_once(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose.read("train", words)


@pytest.mark.parametrize(
    ("processes", "on_cpu", "offload", "wanted"),
    [
        (2, False, True, {"backend": "cuda:nccl,cpu:gloo"}),
        (1, False, True, {}),
        (2, True, True, {}),
        (2, False, False, {}),
    ],
)
def test_shares_on_the_cpu_are_exchanged_there(
    processes: int, on_cpu: bool, offload: bool, wanted: dict[str, str]
) -> None:
    """NCCL only takes what is on a GPU."""
    config = tiny.config(None)
    config.sharding = ShardingConfig("fsdp", offload)
    options = session.exchange(config, World(processes=processes), on_cpu=on_cpu)
    assert options == {"timeout": session.TIMEOUT, **wanted}


@pytest.mark.parametrize(
    ("count", "given", "wanted"), [(2, None, "bfloat16"), (2, "float32", "float32"), (1, None, None)]
)
def test_four_bit_weights_are_stored_so_that_they_can_be_sharded(count: int, given: str | None, wanted: str) -> None:
    config = tiny.config(None, quantization={**tiny.QUANTIZED["nf4"], "bnb_4bit_quant_storage": given})
    config.sharding.name = "fsdp"
    engine: Any = SimpleNamespace(num_processes=count, mixed_precision="bf16")
    assert sharding.storage(config, engine).fields["bnb_4bit_quant_storage"] == wanted
    assert config.quantization.fields["bnb_4bit_quant_storage"] == given, "the config stays what was asked for"
