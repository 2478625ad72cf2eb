"""What a merge made and found, for its model card and the last lines of the command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmtune.config.schema import Config
from vlmtune.export import proof, scoring
from vlmtune.export.sources import Source
from vlmtune.models.combining import Way


@dataclass
class Merged:
    """What a merge made and found."""

    folder: Path
    sources: list[Source]
    shares: list[float]
    """The weight of each run."""
    asked: Config
    """Of the first run, with the command's keys."""
    config: Config
    """The same for the model as it is merged: nothing is quantized."""
    dtype: torch.dtype
    way: Way | None
    """How several adapters became one."""
    difference: proof.Difference
    scores: list[scoring.Scored] = field(default_factory=list)
    """Of the models that were scored; the written one is last."""
    rows: int = 0
    """Rows that they were scored on."""
    fingerprint: str = ""
    """Of these rows."""
    address: str | None = None
    """Where it was uploaded to."""
