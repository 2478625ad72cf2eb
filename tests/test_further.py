"""More of the same: a run with more epochs than it had, and a new run from another one's adapter."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
import vlmtune
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.training import checkpoint

Overrides = Callable[..., list[str]]
CONSTANT = "trainer.scheduler.name=constant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("further")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], folder: Path) -> Overrides:
    """LoRA with dropout on 12 rows in steps of 4: an epoch has three steps."""
    rows = [(f"what is {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(12)]
    table = tiny.write_csv(folder, rows, per_image=2)

    def make(name: str, *more: str) -> list[str]:
        return [
            "model=auto",
            f"model.path={checkpoint_of('qwen2_vl')}",
            "data=csv",
            f"data.train={table}",
            f"data.validation={table}",
            "data.max_eval_rows=4",
            "generation.max_new_tokens=4",
            "tracker=none",
            "trainer.batch_size=4",
            "trainer.learning_rate=1e-2",
            "trainer.log_every=1",
            f"hydra.run.dir={folder / name}",
            *more,
        ]

    return make


def logged(run: Path, prefix: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with keys of this prefix, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in row.items() if "second" not in k} for row in rows if any(prefix in key for key in row)]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in found]


def state(run: Path, step: int) -> tuple[bytes, bytes, dict[str, Any]]:
    """Weights, optimizer and progress of a checkpoint; of the progress what does not depend on how the run came to it."""
    saved = run / "checkpoints" / f"step_{step:06d}"
    progress = json.loads((saved / "state.json").read_text())["progress"]
    for key in ("seconds", "first_total", "changes"):
        del progress[key]
    files = ("model.safetensors", "optimizer.safetensors")
    return (*((saved / name).read_bytes() for name in files), progress)  # type: ignore[return-value]


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed before a later checkpoint than that of `step`."""
    for saved in checkpoint.all_checkpoints(run / "checkpoints"):
        if saved.name > f"step_{step:06d}":
            shutil.rmtree(saved)
    (run / "result.json").unlink()


# ---------------------------------------------------------------- more epochs


def test_more_epochs_are_those_of_a_run_that_had_them_from_its_start(overrides: Overrides, folder: Path) -> None:
    """Bit for bit: extended when it was complete, and killed and resumed on its way. Its warmup keeps its three steps,
    which are a third of the straight run's.
    """
    keys = (CONSTANT, "trainer.save_every=1", "trainer.keep_checkpoints=9", "trainer.best_metric=eval/loss")
    keys += ("adapter.lora_dropout=0.1",)
    vlmtune.train(overrides("straight", *keys, "trainer.epochs=3", "trainer.scheduler.warmup_fraction=0.3334"))
    first = vlmtune.train(overrides("more", *keys, "trainer.epochs=1", "trainer.scheduler.warmup_fraction=1"))
    run, straight = folder / "more", folder / "straight"
    assert first["steps"] == 3
    second = vlmtune.train([f"resume={run}", "trainer.epochs=3"])
    cut_back(run, 2)
    vlmtune.train([f"resume={run}"])
    cut_back(run, 5)
    third = vlmtune.train([f"resume={run}"])
    assert second["steps"] == third["steps"] == 9
    assert second["metrics"] == third["metrics"]
    assert logged(run, "train/loss") == logged(straight, "train/loss")
    assert [row["train/learning_rate"] for row in logged(run, "train/loss")] == pytest.approx(
        [0, 1e-2 / 3, 2e-2 / 3, *[1e-2] * 6]
    )
    assert logged(run, "eval/loss") == logged(straight, "eval/loss")
    assert state(run, 9) == state(straight, 9)
    weights = "model/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (straight / weights).read_bytes()
    assert json.loads((run / "result.json").read_text())["steps"] == 9
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 3


def test_a_schedule_that_is_spread_over_all_steps_says_how_to_go_on(overrides: Overrides, folder: Path) -> None:
    run = folder / "decayed"
    vlmtune.train(overrides("decayed", "trainer.epochs=1"))
    longer = [f"resume={run}", "trainer.epochs=2"]
    with pytest.raises(CheckpointError) as caught:
        vlmtune.train(longer)
    assert "steps in all was 3, now 6: the cosine schedule is spread over all steps" in str(caught.value)
    assert f"add {CONSTANT}. For a different run choose a new hydra.run.dir; adapter.from={run} " in str(caught.value)
    assert vlmtune.train([*longer, CONSTANT])["steps"] == 6
    assert [row["train/learning_rate"] for row in logged(run, "train/loss")][3:] == [1e-2] * 3


def test_a_run_that_is_to_end_before_the_step_it_has_reached_is_refused(overrides: Overrides, folder: Path) -> None:
    run = folder / "shorter"
    vlmtune.train(overrides("shorter", CONSTANT, "trainer.epochs=2", "trainer.save_every=2"))
    cut_back(run, 4)
    with pytest.raises(CheckpointError, match="steps in all was 6, now 3: 4 steps are done already"):
        vlmtune.train([f"resume={run}", "trainer.epochs=1"])
    with pytest.raises(CheckpointError, match="steps in all was 6, now 3: 4 steps are done already"):
        vlmtune.train([f"resume={run}", "trainer.max_steps=3"])
    assert vlmtune.train([f"resume={run}", "trainer.max_steps=5"])["steps"] == 5
    with pytest.raises(CheckpointError, match=r"trainer\.epochs was 2\.0, now 9\.0: trainer\.max_steps=5 overrides it"):
        vlmtune.train([f"resume={run}", "trainer.epochs=9"])


def test_a_run_that_stopped_early_says_how_to_go_on(overrides: Overrides, folder: Path) -> None:
    run = folder / "early"
    early = ("trainer.best_metric=eval/loss", "trainer.early_stopping_patience=1", "trainer.eval_every=1")
    stopped = vlmtune.train(overrides("early", CONSTANT, *early, "trainer.epochs=4", "trainer.learning_rate=1e4"))
    assert stopped["steps"] < 12
    with pytest.raises(CheckpointError, match=r"stopped early.*add trainer\.early_stopping_patience=null"):
        vlmtune.train([f"resume={run}", "trainer.epochs=5"])
    went_on = vlmtune.train([f"resume={run}", "trainer.epochs=5", "trainer.early_stopping_patience=null"])
    assert went_on["steps"] == 15


def test_a_complete_run_without_checkpoints_names_the_way(overrides: Overrides, folder: Path) -> None:
    vlmtune.train(overrides("bare", "trainer.max_steps=1", "trainer.save_every=null"))
    with pytest.raises(CheckpointError, match=rf"start a new run: adapter\.from={folder / 'bare'}$"):
        vlmtune.train([f"resume={folder / 'bare'}", "trainer.max_steps=2"])
    vlmtune.train(overrides("whole", "adapter=none", "trainer.max_steps=1", "trainer.save_every=null"))
    whole = folder / "whole"
    with pytest.raises(CheckpointError, match=rf"start a new run: model=auto model\.path={whole / 'model'}$"):
        vlmtune.train([f"resume={whole}", "trainer.max_steps=2"])


# ---------------------------------------------------------------- another run's adapter


@pytest.fixture(scope="module")
def source(overrides: Overrides, folder: Path) -> Path:
    """A complete run with an adapter of rank 4 on some layers."""
    vlmtune.train(overrides("source", "adapter.r=4", "adapter.target_modules=[q_proj,v_proj]", "trainer.epochs=2"))
    return folder / "source"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")
