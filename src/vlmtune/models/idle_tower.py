"""Under sharding, the image encoder runs on every process if it runs on one: its blocks are gathered by all together.

Without this, a process whose rows have no images leaves the others waiting, or takes their pieces of one block for
those of another.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmtune.data.splits import Records
from vlmtune.launch.engine import Engine
from vlmtune.models.parts import base_of
from vlmtune.prompt.encode import Encoder


def keep_in_step(model: Any, encoder: Encoder, records: Records, engine: Engine) -> None:
    """From here on, a training pass without images has the encoder of the sharded `model` run on a plain image where
    another process has images. Nothing is done if all `records` have some, or the model always takes some (Idefics).
    """
    base = base_of(model)
    encode = getattr(base.base_model, "get_image_features", None)
    if encode is None or (not records.on_demand and all(record.images for record in records)):
        return
    tower = IdleTower(encode, encoder, engine)
    base.register_forward_pre_hook(tower.ask, with_kwargs=True)
    base.get_decoder().register_forward_pre_hook(tower.run, with_kwargs=True)


class IdleTower:
    """Two hooks: one before the forward pass of the model, and one before that of its decoder, which comes when other
    processes have encoded their images.
    """

    def __init__(self, encode: Any, encoder: Encoder, engine: Engine):
        self.encode, self.engine, self.needed = encode, engine, False
        inputs, _ = encoder.family.images([[Image.new("RGB", (64, 64))]])
        taken = inspect.signature(encode).parameters
        self.inputs = {name: value.to(engine.device) for name, value in inputs.items() if name in taken}

    def ask(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Ask the other processes whether one of them has images."""
        self.needed = False
        if torch.is_grad_enabled():  # an evaluation has the whole model, and its own number of passes
            shown = any(name.startswith("pixel_values") for name in kwargs)
            counted = self.engine.reduce(torch.tensor(float(shown), device=self.engine.device), "sum")
            self.needed = bool(counted) and not shown

    def run(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Add zero times the features: so the backward pass comes by as well, with gradients of zero."""
        if not self.needed:
            return None
        output = self.encode(**self.inputs, return_dict=True)
        found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        tensors: list[Tensor] = [tensor for each in found for tensor in ([each] if isinstance(each, Tensor) else each)]
        nothing = sum(tensor.sum() for tensor in tensors) * 0.0
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + nothing}
