"""What may go wrong while a run trains: a lost image, a full disk, a lost tracker, a NaN. Nothing gained is lost."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
import vlmtune
from grids import thinned
from runs import losses, words
from test_memory import assert_equal
from vlmtune import run as page
from vlmtune.errors import CheckpointError, DataError, NonFinite

Overrides = Callable[..., list[str]]
ROWS = 20


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A row per image; in steps of 4 rows, the fourth step begins behind the middle of an epoch."""
    rows = [(f"number {i}?", ("red", "blue")[i % 2]) for i in range(ROWS)]
    return tiny.write_csv(tmp_path, rows, per_image=1)


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], table: Path, tmp_path: Path) -> Overrides:
    def make(*more: str, name: str = "run") -> list[str]:
        steps = ["trainer.batch_size=4", "trainer.max_steps=4", "trainer.learning_rate=1e-2", "trainer.save_every=2"]
        own = [*steps, "adapter.lora_dropout=0.2", "trainer.log_every=1", f"hydra.run.dir={tmp_path / name}"]
        return [*words(checkpoint_of("qwen2_vl"), table), *own, *more]

    return make


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something before the first forward pass of a step, and of later ones."""
    real = page.session.seed_step

    def acting(seed: int, engine: Any, done: int) -> None:
        real(seed, engine, done)
        if done >= step - 1:
            act()

    monkeypatch.setattr(page.session, "seed_step", acting)


# ---------------------------------------------------------------- images


def deleted(image: Path) -> None:
    image.unlink(missing_ok=True)


def truncated(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "workers"), thinned([(deleted, 0), (truncated, 2), (deleted, 2), (truncated, 0)], 1)
)
def test_an_image_that_is_lost_in_mid_epoch_is_named_and_nothing_before_it_is_lost(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], workers: int
) -> None:
    """Once it is back, the run goes on as if nothing had happened."""
    one_by_one = ["trainer.batch_size=1", "trainer.rows_per_step=4"]  # workers have not made all of them in advance
    vlmtune.train(overrides(*one_by_one, name="straight"))
    images = sorted(tmp_path.glob("*.png"))
    content = {image: image.read_bytes() for image in images}
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: [damage(image) for image in images])
        with pytest.raises(DataError, match=r"rows\.csv, line \d+.*\.png") as found:
            vlmtune.train(overrides(*one_by_one, f"trainer.num_workers={workers}", "trainer.save_every=null"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["error"]["failure"] == "data"
    assert str(found.value) in result["error"]["message"]
    reached = checkpoints(tmp_path / "run")
    assert reached
    assert reached[-1] < "step_000004"
    for image in images:
        image.write_bytes(content[image])
    vlmtune.train([f"resume={tmp_path / 'run'}"])
    assert_equal(tmp_path / "run", tmp_path / "straight")


def test_an_image_replaced_in_mid_run_is_refused_by_the_resume(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training takes what it finds; only the start compares all images with those of the run."""
    image = sorted(tmp_path.glob("*.png"))[0]
    before_step(monkeypatch, 2, lambda: Image.new("RGB", (150, 90)).save(image))
    assert vlmtune.train(overrides())["status"] == "completed"
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(CheckpointError, match="image content"):
        vlmtune.train([f"resume={tmp_path / 'run'}"])


# ---------------------------------------------------------------- NaN


def test_a_step_that_is_not_finite_keeps_what_was_reached_before_it(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its resume takes up the steps, here without the NaN, as the straight run did."""
    vlmtune.train(overrides(name="straight"))
    calls: list[int] = []

    def third_is_nan(model: Any, batch: Any) -> torch.Tensor:
        calls.append(batch.rows)
        return real(model, batch) * (math.nan if len(calls) == 4 else 1.0)

    real = page.summed_loss
    with monkeypatch.context() as patch:
        patch.setattr(page, "summed_loss", third_is_nan)
        with pytest.raises(NonFinite, match=r"at step 4\. A lower trainer\.learning_rate"):
            vlmtune.train(overrides())
    assert checkpoints(tmp_path / "run") == ["step_000002", "step_000003"]
    vlmtune.train([f"resume={tmp_path / 'run'}"])
    assert_equal(tmp_path / "run", tmp_path / "straight")


# ---------------------------------------------------------------- a full disk


PROGRAM = """
import resource, sys
import vlmtune
from vlmtune.training import checkpoint
real = checkpoint.write
def then_full(root, *given, **options):
    folder = real(root, *given, **options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    return folder
checkpoint.write = then_full
vlmtune.train(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [40_000, 10])
def test_a_disk_that_fills_up_in_mid_run_is_one_sentence_and_keeps_the_checkpoint(
    overrides: Overrides, tmp_path: Path, size: int
) -> None:
    """Enough for a line of metrics, not for the next checkpoint; and not even for a line."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(size), *overrides()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    what = "step_000004: can't be written" if size > 10 else "metrics.jsonl"
    assert what in last, done.stderr[-2000:]
    assert "the disk is full, or a limit on file sizes is reached" in last
    assert ("it took " in last) == (size > 10)
    assert checkpoints(tmp_path / "run") == ["step_000002"]
    vlmtune.train([f"resume={tmp_path / 'run'}"])
    assert len(losses(tmp_path / "run")) == 4
