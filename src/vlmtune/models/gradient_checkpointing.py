"""Recompute activations in the backward pass, in place of keeping them."""

from __future__ import annotations

from typing import Any

from vlmtune.config.schema import TrainerConfig


def prepare(model: Any, trainer: TrainerConfig) -> None:
    """Turn gradient checkpointing on if asked for.

    transformers then has the embedding of every nested model ask for a gradient. Only reentrant checkpointing needs
    that, and a frozen vision tower would be kept, computed again and differentiated.
    """
    if trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
