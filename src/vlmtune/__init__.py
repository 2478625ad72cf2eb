"""vlmtune: fine-tune vision-language models."""

from vlmtune.api import load, train
from vlmtune.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError, VlmtuneError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ModelError",
    "TrainingError",
    "VlmtuneError",
    "load",
    "train",
]
