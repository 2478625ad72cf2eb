"""Folders of finished runs whose adapters were drawn instead of trained: what merging needs of a run, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

import tiny
from vlmtune.config.schema import plain
from vlmtune.data.fingerprint import model_files
from vlmtune.models.adapters import adapt
from vlmtune.models.load import load
from vlmtune.models.parts import find_parts
from vlmtune.training.model_folder import save_model

FP32 = {"dtype": torch.float32, "compute_dtype": torch.float32}
TARGETS = {"method": "lora", "target_modules": ["q_proj", "v_proj", "down_proj"]}


def drawn_run(
    folder: Path,
    checkpoint: Path,
    fields: dict[str, Any],
    *,
    seed: int = 0,
    scale: float = 0.05,
    quantization: dict[str, Any] | None = None,
) -> Path:
    """A run folder whose adapter changes the answers of `checkpoint`."""
    config = tiny.config(checkpoint, adapter={**TARGETS, **fields}, quantization=quantization)
    opened, processor = load(config.model, config.quantization, device=torch.device("cpu"), **FP32)
    torch.manual_seed(seed)
    model = adapt(opened, config, find_parts(opened)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    save_model(model, processor, folder / "model", config.model)
    config.generation.max_new_tokens = 4
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    noted = {"base_model": model_files(str(checkpoint), None), "versions": {}, "git": None}
    (folder / "environment.json").write_text(json.dumps(noted))
    return folder
