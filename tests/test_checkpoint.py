"""State on disk: a resumed run is the straight one bit for bit, and a checkpoint is whole or absent."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

import tiny
from grids import thinned
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config.schema import Config
from vlmtune.errors import CheckpointError
from vlmtune.models.load import load_trained
from vlmtune.models.quantization import keep_trainable_on_cpu
from vlmtune.prompt.encode import Encoder
from vlmtune.record.progress import Progress
from vlmtune.training import checkpoint, snapshot
from vlmtune.training.checkpoint import all_checkpoints, load_checkpoint, load_weights, whole
from vlmtune.training.model_folder import save_model

PROGRESS = Progress(step=3, first_total=9, examples=24, tokens=999, skipped=1, best=0.5, best_step=2, since_best=1)
DROPOUT = {**tiny.LORA, "lora_dropout": 0.1}


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen2_vl")


def save(run: tiny.Run, root: Path, *, keep: int = 2) -> Path:
    taken = snapshot.take(run.model, run.optimizer, None, run.progress, run.loader.identity)
    return checkpoint.write(root, taken, keep=keep)


def resume(config: Config, rows: Any, at: Path) -> tiny.Run:
    """A new run resumed from the checkpoint `at`, as `Saving` does it."""
    run = tiny.assemble(config, rows)
    run.progress = load_checkpoint(at, run.model, run.optimizer, None, run.loader.identity)
    for _ in range(run.progress.step):
        run.scheduler.step()
    return run


# ---------------------------------------------------------------- resume is an equality


@pytest.mark.parametrize(
    "choice",
    thinned(
        [
            {"adapter": DROPOUT},
            {"adapter": DROPOUT, "share_prefix": "off", "gradient_accumulation_steps": 2, "batch_size": 2},
            {"adapter": DROPOUT, "optimizer": {"name": "adamw_8bit"}},
            {"adapter": DROPOUT, "quantization": tiny.QUANTIZED["nf4"]},
            {"optimizer": {"name": "muon"}},
            {},
            {"model": {"dtype": "bf16"}, "precision": "bf16"},
            {"model": {"dtype": "bf16"}, "precision": "bf16", "optimizer": {"name": "adamw_8bit"}},
        ],
        4,
    ),
    ids=["lora", "accumulation", "8-bit optimizer", "nf4", "muon", "full", "bf16 weights", "bf16, 8-bit optimizer"],
)
def test_a_resumed_run_is_the_straight_one(folder: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    assert_resumes(tiny.config(folder, max_steps=8, **choice), tmp_path)


FREEZE = {"freeze": ["vision", "projector"]}


@pytest.mark.parametrize(
    ("weights", "features", "share", "size", "workers"),
    thinned(
        product(
            [{"adapter": tiny.LORA}, {"adapter": DROPOUT}, {"model": FREEZE}],
            ["memory", "off"],
            ["on", "off"],
            [{"batch_size": 4}, {"batch_tokens": 150}],
            [0, 2],
        ),
        5,
    ),
)
def test_a_resumed_run_is_the_straight_one_however_its_rows_come(
    folder: Path, tmp_path: Path, weights: dict[str, Any], features: str, share: str, size: dict[str, int], workers: int
) -> None:
    config = tiny.config(folder, max_steps=8, share_prefix=share, num_workers=workers, **weights, **size)
    config.data.cache_features = features
    run = assert_resumes(config, tmp_path)
    assert (run.encoder.image_cache is not None) == (features == "memory")


def assert_resumes(config: Config, tmp_path: Path) -> tiny.Run:
    """Losses, weights and order, from the middle of the second epoch; dropout shows a lost random state."""
    rows = tiny.records(14, per_image=2)
    straight = tiny.assemble(config, rows).fit()

    first = tiny.assemble(config, rows).fit(stop_after=5)
    path = save(first, tmp_path)
    torch.manual_seed(99)
    second = resume(config, rows, path).fit()
    assert first.losses + second.losses == straight.losses
    assert replace(second.progress, seconds=0.0) == replace(straight.progress, seconds=0.0)
    wanted = straight.weights()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in second.weights().items())
    assert [r.learning_rate for r in second.reports] == [r.learning_rate for r in straight.reports[5:]]
    return second


def test_loading_for_the_next_step_draws_no_random_number(folder: Path) -> None:
    run = tiny.assemble(tiny.config(folder), tiny.records(4))
    before = torch.get_rng_state()
    next(run.loader.micro_batches())
    assert torch.equal(torch.get_rng_state(), before), "or dropout after a resume would differ"


def test_8_bit_optimizer_state_comes_back(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(folder, optimizer={"name": "adamw_8bit"})
    run = tiny.assemble(config, tiny.records(8)).fit()
    again = resume(config, tiny.records(8), save(run, tmp_path))
    wanted, found = run.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]
    saved, others = dict(snapshot._leaves(wanted)), dict(snapshot._leaves(found))
    assert torch.uint8 in {v.dtype for v in saved.values() if torch.is_tensor(v)}, "some matrix is stored in 8 bits"
    assert saved.keys() == others.keys()
    for path, value in saved.items():
        assert torch.equal(torch.as_tensor(others[path]), torch.as_tensor(value)), path


# ---------------------------------------------------------------- whole or absent


@pytest.fixture
def run(folder: Path) -> tiny.Run:
    return tiny.assemble(tiny.config(folder, adapter=tiny.LORA, max_steps=1), tiny.records(4)).fit()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    earlier = save(run, tmp_path)
    content = {file.name: file.read_bytes() for file in earlier.iterdir()}
    calls = 0
    real = checkpoint.save_file

    def fill_up(tensors: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        real(tensors, path)
        if calls == 2:
            raise failure

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    run.progress.step = 2
    with pytest.raises(CheckpointError, match=r"the disk is full, or a limit .*; earlier checkpoints are untouched"):
        save(run, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert {file.name: file.read_bytes() for file in earlier.iterdir()} == content


def test_a_bug_of_ours_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_killed_save_leaves_nothing_that_counts(run: tiny.Run, tmp_path: Path) -> None:
    (tmp_path / ".step_000007.partial").mkdir()
    (tmp_path / ".step_000007.partial" / "old").write_text("half")
    assert all_checkpoints(tmp_path) == []
    run.progress.step = 7
    path = save(run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000007"]
    assert not (path / "old").exists()


def test_saving_again_replaces(run: tiny.Run, tmp_path: Path) -> None:
    first = save(run, tmp_path)
    run.progress.examples = 123
    assert save(run, tmp_path) == first
    assert json.loads((first / "state.json").read_text())["progress"]["examples"] == 123


def test_the_newest_and_the_best_are_kept(run: tiny.Run, tmp_path: Path) -> None:
    run.progress.best_step = 2
    for step in (1, 2, 3, 4, 999_999, 1_000_000):
        run.progress.step = step
        save(run, tmp_path, keep=2)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_000002", "step_999999", "step_1000000"]


# ---------------------------------------------------------------- refusals


def test_a_checkpoint_of_other_data_is_refused(folder: Path, tmp_path: Path, run: tiny.Run) -> None:
    path = save(run, tmp_path)
    config = tiny.config(folder, adapter=tiny.LORA, max_steps=1)
    with pytest.raises(CheckpointError, match=r"training rows was 4, now 5[\s\S]*data fingerprint"):
        resume(config, tiny.records(5), path)
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        resume(tiny.config(folder, adapter=tiny.LORA, max_steps=1, seed=1), tiny.records(4), path)


def test_a_checkpoint_of_other_weights_is_refused(folder: Path, tmp_path: Path, run: tiny.Run) -> None:
    path = save(run, tmp_path)
    with pytest.raises(CheckpointError, match="its weights are not those that this run trains"):
        resume(tiny.config(folder, max_steps=1), tiny.records(4), path)
    with pytest.raises(CheckpointError, match="its weights are not those"):
        resume(tiny.config(folder, adapter={**tiny.LORA, "r": 8}, max_steps=1), tiny.records(4), path)


@pytest.mark.parametrize(
    ("file", "content"),
    thinned(
        [("state.json", None), ("state.json", b"{"), ("model.safetensors", b"12"), ("optimizer.safetensors", None)], 2
    ),
)
def test_a_damaged_checkpoint_is_refused(
    run: tiny.Run, folder: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    path = save(run, tmp_path)
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resume(tiny.config(folder, adapter=tiny.LORA, max_steps=1), tiny.records(4), path)


# ---------------------------------------------------------------- a saved model loads everywhere


def logits(model: Any, encoder: Encoder) -> torch.Tensor:
    batch = padded(encoder, tiny.records(3), answered=False)
    with torch.no_grad():
        return model.eval()(**model_inputs(model, batch)).logits


def trained(config: Config, folder: Path) -> tuple[tiny.Run, torch.Tensor]:
    run = tiny.assemble(config, tiny.records(6)).fit()
    wanted = logits(run.model, run.encoder)
    save_model(run.model, run.processor, folder / "model")
    return run, wanted


def reopened(config: Config, run: tiny.Run, folder: Path) -> Any:
    types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    model, processor = load_trained(folder, config, **types)
    assert Encoder(processor).encode(tiny.records(1), answered=True) is not None
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_adapter_loads_with_peft_and_here(
    checkpoint_of: Any, model_of: Any, tmp_path: Path, family: str
) -> None:
    config = tiny.config(checkpoint_of(family), adapter=tiny.LORA, learning_rate=1e-2)
    run, wanted = trained(config, tmp_path)
    untrained = model_of(family)
    assert not torch.equal(logits(untrained, run.encoder), wanted)
    plain = PeftModel.from_pretrained(untrained, tmp_path / "model")
    torch.testing.assert_close(logits(plain, run.encoder), wanted, rtol=0, atol=1e-5)  # without our rewrites
    for _ in range(2):
        assert torch.equal(logits(reopened(config, run, tmp_path), run.encoder), wanted)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_saved_weights_load_with_transformers_and_here(checkpoint_of: Any, tmp_path: Path, family: str) -> None:
    config = tiny.config(checkpoint_of(family), learning_rate=1e-2)
    run, wanted = trained(config, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(plain, run.encoder), wanted, rtol=0, atol=1e-5)  # without our rewrites
    assert torch.equal(logits(reopened(config, run, tmp_path), run.encoder), wanted)


def test_a_saved_qlora_adapter_loads_over_the_same_4_bit_base(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(folder, adapter=tiny.LORA, quantization=tiny.QUANTIZED["nf4"], learning_rate=1e-2)
    run, wanted = trained(config, tmp_path)
    for _ in range(2):
        assert torch.equal(logits(reopened(config, run, tmp_path), run.encoder), wanted)
    options = {"quantization_config": run.model.get_base_model().config.quantization_config}
    base = AutoModelForImageTextToText.from_pretrained(folder, device_map={"": "cpu"}, **options)
    keep_trainable_on_cpu(base)  # the packed form that newer CPUs take computes in bfloat16
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "model"), run.encoder), wanted, rtol=0, atol=1e-5
    )  # without our rewrites


def test_a_save_that_loses_a_weight_is_found(run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT leaves tensors out that it does not think of as the adapter's."""
    extra = torch.nn.Parameter(torch.ones(3))
    run.model.get_base_model().register_parameter("forgotten", extra)
    with pytest.raises(CheckpointError, match=r"do not hold the trained value of .*forgotten"):
        save_model(run.model, run.processor, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_progress_round_trips(run: tiny.Run, folder: Path, tmp_path: Path) -> None:
    run.progress = replace(PROGRESS)
    config = tiny.config(folder, adapter=tiny.LORA, max_steps=1)
    assert resume(config, tiny.records(4), save(run, tmp_path)).progress == PROGRESS
    load_weights(tmp_path / "step_000003", run.model)
