"""What a run left in its folder, and the words that start a small one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmtune.record.metrics_file import read_metrics


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
    return {name: tensor for file in (run / "model").glob("*.safetensors") for name, tensor in load_file(file).items()}
