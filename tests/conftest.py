"""What the tests share: no network, one thread, tiny checkpoints written once per session."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same numbers whatever ran before it, alone or among all."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint by name, written when it is first asked for. Not to be changed by a test."""
    import tiny

    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tiny.build(name, tmp_path_factory.mktemp(name))
        return written[name]

    return folder


@pytest.fixture(scope="session")
def encoder_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """The encoder of a tiny checkpoint's processor."""
    from vlmtune.config.schema import ModelConfig
    from vlmtune.prompt.encode import Encoder
    from vlmtune.prompt.processors import load_processor

    made: dict[str, Any] = {}

    def encoder(name: str) -> Any:
        if name not in made:
            made[name] = Encoder(load_processor(ModelConfig(path=str(checkpoint_of(name)))))
        return made[name]

    return encoder


@pytest.fixture
def model_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """A new copy of a tiny checkpoint's model in float32, in evaluation mode."""

    def model(name: str) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(checkpoint_of(name)).eval()

    return model
