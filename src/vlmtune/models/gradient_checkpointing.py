"""Recompute activations in the backward pass, in place of keeping them."""

from __future__ import annotations

from typing import Any

from vlmtune.config.schema import TrainerConfig


def prepare(model: Any, trainer: TrainerConfig) -> None:
    """Turn gradient checkpointing on if asked for, so that it works over frozen embeddings too."""
    if trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
