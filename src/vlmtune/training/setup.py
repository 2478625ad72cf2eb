"""Everything that a run needs, as `run.build` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config
from vlmtune.data.splits import Split
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder


@dataclass
class Setup:
    """One run before its first step."""

    config: Config
    folder: Path
    """The run folder, the same on every process; only the first one writes."""
    engine: Any
    splits: dict[str, Split]
    model: Any
    prepared: Any
    """The model as the engine computes with it: wrapped where there are several processes."""
    parts: Parts
    processor: Any
    encoder: Encoder
    loader: Loader
    optimizer: Any
    scheduler: Any

    @property
    def writes(self) -> bool:
        """Whether this process writes files: the first one does."""
        return bool(self.engine.is_main_process)
