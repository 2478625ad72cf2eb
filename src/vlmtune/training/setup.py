"""Everything that a run needs, as `run.build` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config, TrainerConfig
from vlmtune.data.splits import Split
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.models import sharding
from vlmtune.models.parts import Parts
from vlmtune.prompt.encode import Encoder
from vlmtune.training.snapshot import saved_buffers


@dataclass
class Setup:
    """A run that is ready for its first step."""

    config: Config
    folder: Path
    """The run folder. The same on every process; only the first process writes to it."""
    engine: Engine
    splits: dict[str, Split]
    model: Any
    prepared: Any
    """The model that the loop calls: wrapped (DDP) if there are several processes, and it is not sharded."""
    parts: Parts
    processor: Any
    encoder: Encoder
    loader: Loader
    optimizer: Any
    scheduler: Any

    @property
    def writes(self) -> bool:
        """Whether this process writes files: only the first one does."""
        return bool(self.engine.is_main_process)


def ready(model: Any, optimizer: Any, trainer: TrainerConfig, engine: Engine) -> tuple[Any, Any]:
    """The model and the optimizer as the loop takes them. From here on, after all checks, the machine computes as
    training does.
    """
    sharded = sharding.is_sharded(model)
    prepared, optimizer = session.prepared(
        model, optimizer, engine, sharded=sharded, same_buffers=not saved_buffers(model)
    )
    session.use_tf32(trainer, engine)
    return prepared, optimizer
