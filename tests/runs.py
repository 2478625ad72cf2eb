"""What a run left in its folder, and the words that start a small one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmtune.record.metrics_file import read_metrics
from vlmtune.training import checkpoint


def words(checkpoint: Path, table: Path) -> list[str]:
    """A model, its rows and no tracker."""
    return ["model=auto", f"model.path={checkpoint}", "data=csv", f"data.train={table}", "tracker=none"]


def curve(run: Path) -> list[tuple[int, float]]:
    """Each logged step with its loss, in the order of metrics.jsonl."""
    return [(row["step"], row["train/loss"]) for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def losses(run: Path) -> list[float]:
    return [loss for _, loss in curve(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What `model/` holds: an adapter, or a whole model."""
    files = [*(run / "model").glob("*.safetensors")]
    assert files, f"{run} has no model"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(run: Path, other: Path) -> None:
    """Bit by bit."""
    found, wanted = weights(run), weights(other)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed before a later checkpoint than that of `step`."""
    for folder in checkpoint.all_checkpoints(run / "checkpoints"):
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    (run / "result.json").unlink()
