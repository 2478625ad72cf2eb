"""Every config field does something: what changes when it changes, and that each is read where it counts.

Most are whole runs of two steps on a tiny checkpoint, through `api.run_in`, so that a key lost on the way shows. Other
files show the effect of the keys that belong to them; the last test here runs over all keys of the schema.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import tiny
import wandb_offline
from fake_ranks import first_of_two
from grids import thinned
from vlmtune import api
from vlmtune import run as page
from vlmtune.batching.loader import Loader
from vlmtune.config.schema import (
    BackendConfig,
    ColumnsConfig,
    Config,
    DataConfig,
    GenerationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    TaskConfig,
    TrackerConfig,
    nested_schema,
)
from vlmtune.data.splits import RecordList
from vlmtune.data.table import load as load_table
from vlmtune.errors import ConfigError, DataError, ModelError, TrainingError
from vlmtune.evaluation import answering, generate
from vlmtune.launch import on_ray, session
from vlmtune.launch.processes import to_start
from vlmtune.launch.world import ALONE
from vlmtune.models import adapters, sharding
from vlmtune.models.load import load
from vlmtune.models.parts import Parts, find_parts
from vlmtune.objectives import next_token as loss
from vlmtune.planning.architecture import architecture_of
from vlmtune.prompt.families import Family
from vlmtune.prompt.hub import hub_options
from vlmtune.prompt.image_cache import STORES
from vlmtune.record import report, tracking
from vlmtune.record.metrics_file import read_metrics
from vlmtune.record.samples import Sample
from vlmtune.training.optim import build_optimizer

FP32: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
CONSTANT = {"trainer.scheduler.name": "constant", "trainer.scheduler.warmup_fraction": 0.0}


# ---------------------------------------------------------------- a run


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    result: dict[str, Any]

    def column(self, name: str) -> dict[int, float]:
        """A curve of metrics.jsonl: step -> value."""
        return {row["step"]: row[name] for row in read_metrics(self.folder / "metrics.jsonl") if name in row}

    @property
    def losses(self) -> list[float]:
        return [*self.column("train/loss").values()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(next((self.folder / "model").glob("*.safetensors")))

    @property
    def largest_b(self) -> float:
        """The largest entry of LoRA's B, which starts at zero: a first step of Adam is as long as the rate."""
        return max(float(tensor.abs().max()) for name, tensor in self.weights.items() if "lora_B" in name)

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in (self.folder / "checkpoints").glob("step_*"))

    def read(self, file: str) -> str:
        return (self.folder / file).read_text()


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file with 12 rows about 4 images: an epoch of 3 steps."""
    rows = [(f"what is number {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(12)]
    return tiny.write_csv(tmp_path_factory.mktemp("table"), rows, per_image=3)


@pytest.fixture
def train(checkpoint_of: Callable[[str], Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run two steps of LoRA in fp32 with these keys changed; each call in a folder of its own."""

    def run(changes: dict[str, Any] | None = None, *, evaluated: bool = False, reported: bool = False) -> Outcome:
        if not reported:  # a tenth of the time
            monkeypatch.setattr(report, "write", lambda *_: None)
        config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, max_steps=2, log_every=1)
        config.data.train = str(table)
        if evaluated:
            config.data.validation, config.data.max_eval_rows = str(table), 3
            config.generation.max_new_tokens = 2
        for key, value in (changes or {}).items():
            change(config, key, value)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return Outcome(folder, api.run_in(folder, config))

    return run


def change(config: Config, key: str, value: Any) -> None:
    """Set one key by its dotted name."""
    *groups, name = key.split(".")
    owner: Any = functools.reduce(getattr, groups, config)
    if key in ("adapter", "quantization"):
        value = tiny.adapter_method(value) if key == "adapter" else tiny.method(value)
    if isinstance(owner, MethodConfig) and not hasattr(owner, name):
        owner = owner.fields
    if isinstance(owner, dict):
        owner[name] = value
    else:
        assert hasattr(owner, name), key
        setattr(owner, name, value)


@dataclass
class Forward:
    """One forward pass of the training loop, or of an evaluation's loss."""

    rows: int
    shared: bool
    computed: torch.dtype
    frozen: set[torch.dtype]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Forward]]:
    """Forward passes as they happen, of `training` and `evaluation`."""
    seen: dict[str, list[Forward]] = {"training": [], "evaluation": []}

    def noting(kind: str, real: Any) -> Any:
        def forward(model: Any, batch: Any) -> Any:
            on = torch.is_autocast_enabled("cpu")
            computed = torch.get_autocast_dtype("cpu") if on else torch.float32
            frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
            seen[kind].append(Forward(batch.rows, batch.branches is not None, computed, frozen))
            return real(model, batch)

        return forward

    monkeypatch.setattr(page, "summed_loss", noting("training", loss.summed_loss))
    monkeypatch.setattr(answering, "logits_in_pieces", noting("evaluation", loss.logits_in_pieces))
    return seen


# ---------------------------------------------------------------- model


def test_names_are_shown_in_the_log_and_in_the_report(train: Train) -> None:
    out = train({"model.name": "my_model", "task.name": "my_task"}, reported=True)
    for name in ("my_model", "my_task"):
        assert name in out.read("train.log")
        assert name in out.read("report.html")


def test_the_model_at_the_path_is_trained(train: Train, checkpoint_of: Callable[[str], Path]) -> None:
    kinds = [
        json.loads(train({"model.path": str(checkpoint_of(name))}).read("environment.json"))["image_processor"]
        for name in ("qwen2_vl", "llava")
    ]
    assert [kind[:4] for kind in kinds] == ["Qwen", "CLIP"]


def test_a_fresh_model_is_made_by_the_named_function_with_the_seed(
    train: Train, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def build(folder: Path, seed: int) -> None:
        shutil.copytree(checkpoint_of("llava"), folder)
        made.append(seed)

    monkeypatch.setitem(sys.modules, "my_models", types.SimpleNamespace(build=build))  # type: ignore[arg-type]
    out = train({"model.path": None, "model.fresh": "my_models.build", "trainer.seed": 7})
    assert made == [7]
    assert json.loads(out.read("base/config.json"))["model_type"] == "llava"
    assert json.loads(out.read("environment.json"))["image_processor"].startswith("CLIP")


@pytest.fixture
def cached(checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a repository in the hub's local cache whose main branch is a Qwen2-VL and whose tag v2 is a LLaVA."""
    repository = tmp_path / "models--somebody--some-model"
    for revision, name, commit in (("main", "qwen2_vl", "a" * 40), ("v2", "llava", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(checkpoint_of(name), repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "somebody/some-model"


def test_a_revision_chooses_among_the_hubs_commits(cached: str) -> None:
    opened = [load(ModelConfig(path=cached, revision=r), tiny.method({}), **FP32) for r in (None, "v2")]
    assert [model.config.model_type for model, _ in opened] == ["qwen2_vl", "llava"]
    assert [type(processor).__name__ for _, processor in opened] == ["Qwen2VLProcessor", "LlavaProcessor"]


def test_remote_code_runs_where_it_is_trusted(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "own_code"))
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "mine", "auto_map": auto}))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(ModelConfig(path=str(folder)), tiny.method({}), **FP32)
    with pytest.raises(SystemExit, match="ran"):
        load(ModelConfig(path=str(folder), trust_remote_code=True), tiny.method({}), **FP32)


@pytest.mark.parametrize(("dtype", "stored"), thinned([("auto", torch.float32), ("bf16", torch.bfloat16)], 1))
def test_weights_are_kept_in_the_asked_type(train: Train, dtype: str, stored: torch.dtype) -> None:
    out = train({"adapter": dict(tiny.NONE), "model.dtype": dtype, "trainer.max_steps": 1})
    assert {tensor.dtype for tensor in out.weights.values()} == {stored}


def test_attention_is_computed_as_asked(checkpoint_of: Callable[[str], Path]) -> None:
    path = str(checkpoint_of("qwen2_vl"))
    for attention in ("eager", "sdpa"):
        model, _ = load(ModelConfig(path=path, attention=attention), tiny.method({}), **FP32)
        assert model.config._attn_implementation == attention


@pytest.mark.slow
def test_a_system_prompt_is_trained_with(train: Train) -> None:
    own, given = train(), train({"model.system_prompt": "Answer in one word, please."})
    assert own.losses[0] != given.losses[0]
    assert train({"model.system_prompt": "You are a helpful assistant."}).losses == own.losses  # the template's own


# ---------------------------------------------------------------- adapter and quantization


@pytest.mark.parametrize("method", thinned(["ia3", None], 1))
def test_the_adapter_is_of_the_asked_method(train: Train, method: str | None) -> None:
    ia3 = {"method": "ia3", "parts": ["language"], "target_modules": ["k_proj"], "feedforward_modules": []}
    out = train({"adapter": {"ia3": ia3, None: tiny.NONE}[method], "trainer.max_steps": 1})
    names = " ".join(out.weights)
    assert [mark in names for mark in ("lora_A", "ia3_l", "embed_tokens")] == [False, method == "ia3", method is None]


def test_a_field_of_pefts_own_reaches_it(train: Train) -> None:
    for rank in (2, 5):
        shapes = {len(tensor) for name, tensor in train({"adapter.r": rank}).weights.items() if "lora_A" in name}
        assert shapes == {rank}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_field_of_transformers_own_reaches_it(checkpoint_of: Callable[[str], Path], kind: str) -> None:
    quantization = {**tiny.QUANTIZED["nf4"], "bnb_4bit_quant_type": kind}
    model, _ = load(ModelConfig(path=str(checkpoint_of("qwen2_vl"))), tiny.method(quantization), **FP32)
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None)]
    assert {state.quant_type for state in states} == {kind}


# ---------------------------------------------------------------- trainer


@pytest.mark.slow
def test_epochs_count_the_rows_and_max_steps_wins(train: Train) -> None:
    steps = [
        train({"trainer.epochs": e, "trainer.max_steps": most}) for e, most in ((1.0, None), (1.5, None), (1.5, 2))
    ]
    assert [out.result["steps"] for out in steps] == [3, 5, 2]


@pytest.mark.parametrize(("size", "accumulation"), thinned([(3, 2), (6, 1)], 1))
def test_rows_per_forward_pass_and_passes_per_step(train: Train, forwards: Any, size: int, accumulation: int) -> None:
    out = train({"trainer.batch_size": size, "trainer.gradient_accumulation_steps": accumulation})
    assert [forward.rows for forward in forwards["training"]] == [size] * accumulation * 2
    assert out.result["examples"] == 12


def test_rows_per_step_are_cut_into_forward_passes(train: Train, forwards: Any) -> None:
    out = train({"trainer.rows_per_step": 5, "trainer.batch_size": 2, "trainer.gradient_accumulation_steps": 7})
    assert [forward.rows for forward in forwards["training"]] == [2, 2, 1] * 2
    assert out.result["examples"] == 10


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (4, None)),
        ({"trainer.gradient_accumulation_steps": 2}, (8, None)),
        ({"trainer.batch_tokens": 200, "trainer.gradient_accumulation_steps": 2}, (None, 2)),
        ({"trainer.batch_tokens": 200, "trainer.passes_per_step": 3}, (None, 3)),
    ],
)
def test_the_size_of_a_step_is_written_into_the_run(train: Train, changes: Any, wanted: tuple[Any, Any]) -> None:
    out = train({**changes, "trainer.max_steps": 1, "trainer.save_every": 1})
    trainer = yaml.safe_load(out.read("config.yaml"))["trainer"]
    assert (trainer["rows_per_step"], trainer["passes_per_step"]) == wanted
    identity = json.loads(out.read("checkpoints/step_000001/state.json"))["identity"]
    assert (identity.get("rows per step"), identity.get("passes per step")) == wanted


def test_passes_per_step(train: Train, forwards: Any) -> None:
    train({"trainer.batch_tokens": 120, "trainer.passes_per_step": 3, "trainer.max_steps": 1})
    assert len(forwards["training"]) == 3


@pytest.mark.parametrize(("size", "wanted"), [(2, [2, 1])])
def test_rows_per_forward_pass_in_evaluation(train: Train, forwards: Any, size: int, wanted: list[int]) -> None:
    train({"trainer.eval_batch_size": size, "trainer.eval_baseline": False}, evaluated=True)
    assert [forward.rows for forward in forwards["evaluation"]] == wanted


@pytest.mark.parametrize("rate", thinned([0.0, 1e-2], 1))
def test_the_first_step_is_as_long_as_the_learning_rate(train: Train, rate: float) -> None:
    out = train({"trainer.learning_rate": rate, "trainer.max_steps": 1, **CONSTANT})
    assert out.largest_b == pytest.approx(rate, rel=1e-2)
    assert out.column("train/learning_rate") == {1: rate}


@pytest.mark.parametrize("most", thinned([None, 1e-3], 1))
def test_gradients_are_scaled_down_to_the_norm(train: Train, most: float | None) -> None:
    """With eps = 1 a first step of Adam is at most rate * gradient."""
    out = train({"trainer.max_grad_norm": most, "optimizer.eps": 1.0, "trainer.max_steps": 1, **CONSTANT})
    norm = out.column("train/gradient_norm")[1]
    assert norm > 0.1, "the logged one is that before scaling"
    assert (out.largest_b <= 1e-3 * 1e-3) == (most is not None)


@pytest.mark.parametrize(("precision", "wanted"), thinned([("auto", torch.float32), ("bf16", torch.bfloat16)], 1))
def test_the_loss_is_computed_in_the_asked_precision(
    train: Train, forwards: Any, precision: str, wanted: torch.dtype
) -> None:
    out = train({"trainer.precision": precision, "trainer.max_steps": 1})
    assert [(forward.computed, forward.frozen) for forward in forwards["training"]] == [(wanted, {wanted})]
    assert {tensor.dtype for tensor in out.weights.values()} == {torch.float32}, "what trains is kept in full"


def test_fp16_is_refused_on_a_cpu(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision=fp16: needs an accelerator; use fp32"):
        train({"trainer.precision": "fp16"})


@pytest.mark.parametrize(("on", "wanted"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_layers_again(
    checkpoint_of: Callable[[str], Path], on: bool, wanted: int
) -> None:
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, gradient_checkpointing=on, max_steps=1)
    run = tiny.assemble(config, tiny.records(4))
    calls: list[str] = []
    layer = run.model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    run.fit()
    assert len(calls) == wanted


@pytest.mark.parametrize(("share", "fits", "wanted"), [("auto", True, True), ("auto", False, False)])
def test_an_image_is_shared_where_the_check_allows_it(
    train: Train, forwards: Any, monkeypatch: pytest.MonkeyPatch, share: str, fits: bool, wanted: bool
) -> None:
    monkeypatch.setattr("vlmtune.proof.probes.layouts_agree", lambda *_: (fits, "said so"))
    train({"trainer.share_prefix": share})
    assert {forward.shared for forward in forwards["training"]} == {wanted}


def test_sharing_is_off_or_refused(train: Train, forwards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train({"trainer.share_prefix": "off"})
    assert {forward.shared for forward in forwards["training"]} == {False}
    monkeypatch.setattr("vlmtune.proof.probes.layouts_agree", lambda *_: (False, "loss differs"))
    with pytest.raises(ConfigError, match=r"trainer\.share_prefix=on: loss differs"):
        train({"trainer.share_prefix": "on"})


@pytest.mark.parametrize(("every", "wanted"), thinned([(2, [0, 2, 4]), ("epoch", [0, 3, 4])], 1))
def test_evaluation_comes_when_asked(train: Train, every: Any, wanted: list[int]) -> None:
    out = train({"trainer.eval_every": every, "trainer.max_steps": 4}, evaluated=True)
    assert [*out.column("eval/loss")] == wanted


@pytest.mark.parametrize("on", thinned([True, False], 1))
def test_the_untrained_model_is_evaluated_first(train: Train, on: bool) -> None:
    out = train({"trainer.eval_baseline": on}, evaluated=True)
    assert ("baseline/loss" in out.result["metrics"]) == on
    assert (0 in out.column("eval/loss")) == on


@pytest.mark.parametrize(("every", "keep", "wanted"), thinned([(None, 2, []), ("epoch", 9, [3, 4]), (1, 2, [3, 4])], 2))
def test_checkpoints_come_when_asked_and_the_newest_are_kept(
    train: Train, every: Any, keep: int, wanted: list[int]
) -> None:
    out = train({"trainer.save_every": every, "trainer.keep_checkpoints": keep, "trainer.max_steps": 4})
    assert out.checkpoints == wanted


def test_a_nonfinite_step_stops_the_run_or_is_left_out(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loss.summed_loss, iter(range(99))

    def spoilt(model: Any, batch: Any) -> Any:
        return real(model, batch) * (math.nan if next(calls) == 0 else 1.0)

    monkeypatch.setattr(page, "summed_loss", spoilt)
    assert train({"trainer.nonfinite": "skip"}).result["skipped_steps"] == 1
    calls = iter(range(99))
    with pytest.raises(TrainingError, match=r"trainer\.nonfinite=skip"):
        train({"trainer.nonfinite": "stop"})


@pytest.mark.parametrize(("every", "wanted"), thinned([(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4, 5])], 1))
def test_steps_are_logged_as_often_as_asked(train: Train, every: int, wanted: list[int]) -> None:
    assert [*train({"trainer.log_every": every, "trainer.max_steps": 5}).column("train/loss")] == wanted


@pytest.mark.parametrize(("workers", "here"), [(0, True), (1, False)])
def test_workers_prepare_batches(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, here: bool
) -> None:
    real, file = Loader.make, tmp_path / "processes"

    def noting(loader: Loader, step: int, number: int) -> Any:
        with file.open("a") as out:
            out.write(f"{os.getpid()}\n")
        return real(loader, step, number)

    monkeypatch.setattr(Loader, "make", noting)
    train({"trainer.num_workers": workers})
    processes = file.read_text().split()
    assert len(processes) == 2
    assert (set(processes) == {str(os.getpid())}) == here


@pytest.mark.slow
def test_a_seed_repeats_a_run_and_another_does_not(train: Train) -> None:
    first, again, other = (train({"trainer.seed": seed}) for seed in (1, 1, 2))
    assert first.losses == again.losses
    assert first.losses[0] != other.losses[0], "another order of rows"
    name = next(name for name in first.weights if "lora_A" in name)
    assert not torch.allclose(first.weights[name], other.weights[name], atol=0.01), "other new weights"


# ---------------------------------------------------------------- data and task


@pytest.mark.parametrize("given", thinned([True, False], 1))
def test_the_test_rows_are_evaluated_at_the_end(train: Train, table: Path, given: bool) -> None:
    change = {"data.test": str(table) if given else None, "data.max_eval_rows": 2, "generation.max_new_tokens": 2}
    out = train(change)
    assert ("test/loss" in out.result["metrics"]) == given
    assert [*out.column("test/loss")] == [2] * given


def test_columns_are_found_by_the_given_names(table: Path) -> None:
    usual, *rows = csv.reader(table.read_text().splitlines())
    assert usual == ["image_path", "question", "answer"]
    names = {"image": "picture", "question": "query", "answer": "label"}
    with (table.parent / "renamed.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*names.values()], *rows])
    wanted = load_table(DataConfig(train=str(table)), TaskConfig(), 0)["train"].records
    renamed = DataConfig(train=str(table.parent / "renamed.csv"), columns=ColumnsConfig(**names))
    found = load_table(renamed, TaskConfig(), 0)["train"].records
    assert [(r.turns, r.images) for r in found] == [(r.turns, r.images) for r in wanted]
    for role in names:
        columns = dataclasses.replace(renamed.columns, **{role: "nothing"})
        with pytest.raises(DataError, match=f"no column 'nothing'.*data.columns.{role}"):
            load_table(dataclasses.replace(renamed, columns=columns), TaskConfig(), 0)


def test_forward_passes_are_filled_by_tokens(train: Train, forwards: dict[str, list[Forward]]) -> None:
    """A step's rows are as many as fit: 12 rows of some 20 tokens."""
    counts = {}
    for tokens in (50, 400):
        forwards["training"].clear()
        out = train({"trainer.batch_tokens": tokens, "trainer.share_prefix": "off"})
        counts[tokens] = [forward.rows for forward in forwards["training"]]
        assert 0 <= min(out.column("train/padding_share").values()) < 0.5
    assert max(counts[50]) < max(counts[400])


@pytest.mark.parametrize("share", thinned(["off", "on"], 1))
def test_schedules_end_with_the_steps_of_the_layout_that_was_chosen(
    train: Train, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    """Of 12 rows of some 50 tokens, four fit into 220; of the four images with three rows each, one."""
    told: list[int] = []
    allocator = importlib.import_module("peft.tuners.adalora.layer").RankAllocator
    monkeypatch.setattr(allocator, "set_total_step", lambda self, steps: told.append(steps))
    changes = {"trainer.max_steps": None, "trainer.epochs": 2.0, "trainer.batch_tokens": 220}
    adapter = {"method": "adalora", "parts": ["language"], "target_modules": ["q_proj"], "tinit": 1, "tfinal": 1}
    out = train({**changes, "trainer.share_prefix": share, "adapter": {**adapter, "init_r": 4, "target_r": 2}})
    rates = out.column("train/learning_rate")
    assert told == [out.result["steps"]] == [max(rates)]
    assert 0 < rates[max(rates)] < min(rate for step, rate in rates.items() if 1 < step < max(rates))
    assert told == [{"off": 6, "on": 8}[share]]


@pytest.mark.slow
def test_large_jpegs_are_decoded_small_unless_that_is_off(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_csv(tmp_path, [("What color is it?", "Red")])
    tiny.image(1000, 800).save(tmp_path / "0.png", "JPEG")
    sizes: set[tuple[int, int]] = set()
    make = Family.images

    def noting(self: Family, pictures: list[list[Any]]) -> Any:
        decoded = [picture for group in pictures for picture in group if picture.getbbox()]  # blank ones only measure
        sizes.update(picture.size for picture in decoded)
        return make(self, pictures)

    monkeypatch.setattr(Family, "images", noting)
    for fast, size in ((True, (250, 200)), (False, (1000, 800))):
        sizes.clear()
        train({"data.train": str(path), "data.fast_jpeg": fast, "trainer.batch_size": 1, "trainer.max_steps": 1})
        assert sizes == {size}


@pytest.mark.slow
def test_features_are_kept_where_asked_for(train: Train, tmp_path: Path) -> None:
    """In memory up to a budget, and in a folder that a later run with no memory finds."""
    folder = tmp_path / "kept"

    def features(**data: Any) -> str:
        STORES.clear()
        log = train({f"data.{key}": value for key, value in data.items()}).read("train.log")
        return next(line for line in log.splitlines() if "image features:" in line)

    assert "image features:" not in train({"data.cache_features": "off"}).read("train.log")
    assert "0 times" not in features(cache_features="memory")
    assert " 0 MB" in features(cache_features="memory", cache_gb=0.0)
    first = features(cache_features="disk", cache_folder=str(folder))
    assert list(folder.glob("features/*/*/*.safetensors"))
    assert " 0 computed" not in first
    assert " 0 computed" in features(cache_features="disk", cache_folder=str(folder), cache_gb=0.0)


def test_large_images_are_bad_rows_and_so_many_may_be_dropped(tmp_path: Path) -> None:
    table = tiny.write_csv(tmp_path, [("what?", "red"), ("what?", "blue"), ("what?", "green")])
    tiny.image(100, 101).save(tmp_path / "1.png")

    def rows(**data: Any) -> int:
        return len(load_table(DataConfig(train=str(table), on_bad_row="drop", **data), TaskConfig(), 0)["train"])

    assert rows() == 3
    assert rows(max_image_pixels=10_000, max_bad_fraction=0.4) == 2
    with pytest.raises(DataError, match=r"too many pixels[\s\S]*above data\.max_bad_fraction=0\.3"):
        rows(max_image_pixels=10_000, max_bad_fraction=0.3)


def test_the_first_metric_is_the_objective(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.SimpleNamespace(quarter=lambda prediction, references: 0.25)
    monkeypatch.setitem(sys.modules, "my_metrics", own)  # type: ignore[arg-type]
    out = train({"task.metrics": ["my_metrics.quarter", "anls"], "trainer.eval_baseline": False}, evaluated=True)
    assert out.result["metrics"].keys() == {"eval/loss", "eval/my_metrics.quarter", "eval/anls"}
    assert out.result["objective"] == 0.25
    assert {row["score"] for row in csv.DictReader(out.read("predictions.csv").splitlines())} == {"0.25"}


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adamw", "torch.optim.adamw.AdamW"),
        ("adamw_8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("paged_adamw", "bitsandbytes.optim.adamw.PagedAdamW"),
        ("paged_adamw_8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
        ("muon", "vlmtune.training.optim.MuonAndAdamW"),
    ],
)
def test_the_optimizer_is_of_the_asked_class(name: str, wanted: str) -> None:
    """Paged state needs a GPU to step; test_checkpoint trains with `adamw_8bit`."""
    built: Any = built_for(torch.nn.Linear(2, 2), tiny.config(None, optimizer={"name": name}))
    built = getattr(built, "inner", built)
    assert f"{type(built).__module__}.{type(built).__name__}" == wanted


def built_for(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    return build_optimizer(model, Parts({"": "language"}), config.trainer, config.optimizer, session.engine(config))


def adamw(rate: float, steps: list[float], o: OptimizerConfig) -> float:
    """A weight of 1 after `steps` with these gradients. Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2."""
    weight, mean, square = 1.0, 0.0, 0.0
    for t, gradient in enumerate(steps, start=1):
        mean = o.beta1 * mean + (1 - o.beta1) * gradient
        square = o.beta2 * square + (1 - o.beta2) * gradient**2
        root = math.sqrt(square / (1 - o.beta2**t))
        weight -= rate * o.weight_decay * weight + rate * mean / (1 - o.beta1**t) / (root + o.eps)
    return weight


@pytest.mark.parametrize("changed", [{}, {"weight_decay": 0.5}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1.0}])
def test_steps_follow_the_formula(changed: dict[str, float]) -> None:
    config, gradients = OptimizerConfig(**changed), [1.0, -3.0, 0.5]  # type: ignore[arg-type]
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = built_for(model, tiny.config(None, learning_rate=0.1, optimizer=changed))
    for gradient in gradients:
        model.weight.grad = torch.full((2, 2), gradient)
        optimizer.step()
    assert model.weight.flatten().tolist() == pytest.approx([adamw(0.1, gradients, config)] * 4, rel=1e-5)
    assert not changed or abs(adamw(0.1, gradients, config) - adamw(0.1, gradients, OptimizerConfig())) > 1e-3


def test_loraplus_lets_b_learn_faster(model_of: Any) -> None:
    config = tiny.config(None, adapter=tiny.LORA, optimizer={"loraplus_lr_ratio": 16.0}, learning_rate=1e-3)
    model = model_of("llava")
    parts = find_parts(model)
    model = adapters.adapt(model, config, parts)
    built = build_optimizer(model, parts, config.trainer, config.optimizer, session.engine(config))
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), name


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values of 1."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_muon_takes_orthogonal_steps_of_adamws_size_on_hidden_matrices(momentum: float) -> None:
    """Two steps of Nesterov momentum; the iteration that stands for the SVD leaves singular values of 0.7 to 1.2."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 16), torch.nn.Linear(16, 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = tiny.config(None, learning_rate=0.1, optimizer={"name": "muon", "momentum": momentum})
    optimizer = built_for(model, config)
    torch.manual_seed(0)
    gradients = torch.randn(2, 8, 16)
    mean, wanted = torch.zeros(8, 16), torch.zeros(8, 16)
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model[1].weight.grad = gradient  # type: ignore[assignment]
        optimizer.step()
        mean = momentum * mean + (1 - momentum) * gradient
        wanted -= 0.1 * 0.2 * 16**0.5 * orthogonal(momentum * mean + (1 - momentum) * gradient)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert torch.cosine_similarity(moved["1.weight"].flatten(), wanted.flatten(), dim=0) > 0.97
    assert float(moved["1.weight"].norm() / wanted.norm()) == pytest.approx(1, abs=0.25)
    other = orthogonal(gradients[1])
    assert torch.cosine_similarity(wanted.flatten(), -other.flatten(), dim=0) < 0.97, "both gradients count"
    for name in ("0.weight", "1.bias"):  # AdamW with a steady gradient of 1: its rate at each step
        assert torch.allclose(moved[name], torch.tensor(-0.2), atol=1e-4)


# ---------------------------------------------------------------- generation


@pytest.fixture
def answers(model_of: Any, encoder_of: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """Generated ids of six rows, by a checkpoint that asks for top_k=1 itself, as Qwen2-VL's do."""
    model, encoder, ids = model_of("qwen2_vl"), encoder_of("qwen2_vl"), []
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.001, temperature=0.01)

    def decode(found: list[list[int]]) -> list[str]:
        ids.extend(found)
        return [""] * len(found)

    monkeypatch.setattr(encoder.answers, "decode", decode)

    def answer(**generation: Any) -> list[list[int]]:
        ids.clear()
        torch.manual_seed(0)
        config = GenerationConfig(**{"max_new_tokens": 6, **generation})
        generate.generate(model, encoder, tiny.records(6), config, batch_size=6, autocast=nullcontext)
        return [*ids]

    return answer


@pytest.mark.parametrize("most", [1, 5])
def test_answers_are_at_most_so_long(answers: Any, most: int) -> None:
    assert {len(ids) for ids in answers(max_new_tokens=most)} == {most}


def test_temperature_samples_and_a_small_top_p_takes_that_back(answers: Any) -> None:
    greedy, sampled = answers(temperature=0.0), answers(temperature=100.0)
    assert greedy == answers(temperature=0.0)
    differing = sum(
        a != b for left, right in zip(greedy, sampled, strict=True) for a, b in zip(left, right, strict=True)
    )
    assert differing > 30, "at such a temperature all tokens are alike, and 36 are drawn"
    assert answers(temperature=1.0, top_p=1e-6) == greedy
    assert answers(temperature=1e-3) == greedy


# ---------------------------------------------------------------- tracker


def test_curves_go_to_the_named_project(tmp_path: Path) -> None:
    tracking.build(TrackerConfig(name="wandb", project="my_project"), {}, tmp_path).finish({})
    assert wandb_offline.read(tmp_path)["exit_code"] == 0
    (log,) = tmp_path.rglob("run-*.wandb")
    assert {r.run.project for r in wandb_offline.records(log) if r.WhichOneof("record_type") == "run"} == {"my_project"}


@pytest.mark.parametrize(("count", "wanted"), thinned([(0, []), (2, [2, 2])], 1))
def test_each_evaluation_shows_so_many_samples(
    train: Train, monkeypatch: pytest.MonkeyPatch, count: int, wanted: list[int]
) -> None:
    shown: list[int] = []

    class Noting(tracking.NoTracker):
        def samples(self, rows: list[Sample], step: int) -> None:
            shown.append(len(rows))

    monkeypatch.setattr(tracking, "build", lambda *_, **__: Noting())
    train({"tracker.samples": count}, evaluated=True)
    assert shown == wanted


# ---------------------------------------------------------------- none is idle


def schemas(schema: type = Config, prefix: str = "") -> Iterator[tuple[type, str]]:
    """Each dataclass of the schema with the prefix of its keys."""
    yield schema, prefix
    for field in dataclasses.fields(schema):
        if nested := nested_schema(field):
            yield from schemas(nested, f"{prefix}{field.name}.")


KEYS = [
    f"{prefix}{field.name}"
    for schema, prefix in schemas()
    for field in dataclasses.fields(schema)
    if not nested_schema(field)
]
PACKAGE = Path(api.__file__).parent
ALL_ALIKE = (PACKAGE / "config", PACKAGE / "training" / "resume.py")
"""Where keys are checked, saved and compared, whatever they are for."""


def noting_reads(schema: type, prefix: str, seen: set[str]) -> Callable[[Any, str], Any]:
    """A `__getattribute__` that notes which keys the package reads; checking and saving a config is no use of it."""
    plain, keys = schema.__getattribute__, {field.name for field in dataclasses.fields(schema)}

    def read(self: Any, name: str) -> Any:
        if name in keys:
            place = Path(sys._getframe(1).f_code.co_filename)
            if PACKAGE in place.parents and not {place, *place.parents} & {*ALL_ALIKE}:
                seen.add(prefix + name)
        return plain(self, name)

    return read


@pytest.fixture(scope="module")
def read(
    checkpoint_of: Callable[[str], Path], table: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[set[str]]:
    """The keys that are read by two runs, which between them turn on what has to be turned on, by opening one of them,
    by reading a hub, and by sharding a model.
    """
    seen: set[str] = set()
    folder = tmp_path_factory.mktemp("read")
    path = str(checkpoint_of("qwen2_vl"))
    lora = tiny.config(path, adapter=tiny.LORA, max_steps=1, generation={"max_new_tokens": 2, "temperature": 1.0})
    lora.data = DataConfig(train=str(table), validation=str(table), test=str(table), max_eval_rows=1)
    lora.data.cache_features = "off"  # beside a cache of images there are no workers
    full = tiny.config(path, max_steps=None, epochs=1.0, batch_size=3, optimizer={"name": "muon"}, save_every=1)
    full.trainer.best_metric, full.trainer.eval_every, full.generation.max_new_tokens = "eval/exact_match", 1, 1
    full.tracker.name = "wandb"
    full.data = DataConfig(
        train=str(uneven(folder, table)), validation_fraction=0.1, on_bad_row="drop", on_duplicate="drop"
    )
    full.data.max_bad_fraction, full.data.cache_features, full.data.cache_folder = 0.5, "disk", str(folder / "kept")
    with pytest.MonkeyPatch.context() as patched:
        for schema, prefix in schemas():
            patched.setattr(schema, "__getattribute__", noting_reads(schema, prefix, seen))
        api.run_in(folder / "lora", lora)
        api.run_in(folder / "full", full)
        api.load(folder / "lora")
        load_table(DataConfig(train=str(hub_set(folder)), **STREAMED), TaskConfig(), 0)
        hub_options(ModelConfig(path="somebody/some-model"))
        architecture_of(ModelConfig(architecture={"model_type": "llava"}))
        to_start(BackendConfig("accelerate", 1), ALONE)
        told = BackendConfig("ray", num_workers=1)
        on_ray.scaling(told), on_ray.run_config(told, folder), on_ray.connection(told)
        with first_of_two() as engine:
            model = AutoModelForImageTextToText.from_pretrained(path)
            sharding.shard(model, ShardingConfig("fsdp"), None, RecordList([]), engine)  # type: ignore[arg-type]
        yield seen


STREAMED: dict[str, Any] = {
    "_target_": "vlmtune.data.sources.hub.load",
    "columns": ColumnsConfig(image="image"),
    "streaming": True,
}


def uneven(folder: Path, table: Path) -> Path:
    """The rows of `table` with one about an image that isn't there, one twice, and a caption."""
    lines = [line if n == 0 else f"{table.parent}/{line}" for n, line in enumerate(table.read_text().splitlines())]
    path = folder / "uneven.csv"
    path.write_text("\n".join([*lines, lines[1], "gone.png,what?,red", f"{table.parent}/0.png,,a red circle"]) + "\n")
    return path


def hub_set(folder: Path) -> Path:
    """Two rows as `datasets` keeps them."""
    datasets = pytest.importorskip("datasets")
    columns = {"image": [tiny.image(), tiny.image(seed=1)], "question": ["what?", "how?"], "answer": ["red", "so"]}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(
        str(folder / "set" / "a.parquet")
    )
    return folder / "set"


@pytest.mark.xdist_group("keys")
@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read_by_what_it_is_for(read: set[str], key: str) -> None:
    """A key that nothing reads, or that was lost on the way to where it counts, would be taken and change nothing."""
    assert key in read
