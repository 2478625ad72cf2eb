"""The folder `model/`: what a run leaves for vlmtune, PEFT and transformers alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmtune.config.schema import ModelConfig
from vlmtune.durable import whole
from vlmtune.errors import CheckpointError
from vlmtune.models.sharding import full, is_sharded


def whole_state(model: Any) -> dict[str, Tensor]:
    """`model.state_dict()`, with what of it is saved as whole tensors on the CPU where the model is sharded.

    All processes must call this together.
    """
    from vlmtune.models.adapters import adapter_state

    state = model.state_dict()
    if not is_sharded(model):
        return state
    saved = {id(tensor) for tensor in (adapter_state(model, state, embeddings="auto") or state).values()}
    gathered: dict[Tensor, Tensor] = {}  # a tied weight once
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(state[name]) in saved:
            if parameter not in gathered:
                gathered[parameter] = full(parameter).cpu()
            state[name] = gathered[parameter]
    return state


def save_model(
    model: Any,
    processor: Any,
    folder: Path,
    config: ModelConfig | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapter (or the whole model), processor and generation config, in PEFT's and transformers' format, or
    in the layout of `config.save_layout`. `state`: as `whole_state` returns it; None: the model is not sharded.

    The weights are read back and compared before the folder gets its final name.
    """
    with whole(folder) as partial:
        write_model(model, processor, partial, config, whole_state(model) if state is None else state)


def write_model(
    model: Any, processor: Any, folder: Path, config: ModelConfig | None, state: dict[str, Tensor], **options: Any
) -> None:
    """What `save_model` does, in a folder that is there. `options`: more arguments of `save_pretrained`."""
    from vlmtune.models.parts import base_of

    if config is not None and config.save_layout == "original":
        from vlmtune.models.internvl2 import save_original

        save_original(model, config, folder, state)
        return
    model.save_pretrained(folder, state_dict=dict(state), **options)  # which is emptied
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template; record.card writes the model card
    processor.save_pretrained(folder)
    base_of(model).generation_config.save_pretrained(folder)
    _compare(model, state, folder)


def _compare(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless the weight files in `folder` hold every trained weight of `state`, bit by bit.

    Compared by content, because names differ between a live model and the hub's layout.
    """
    from vlmtune.models.adapters import adapter_state, saved_name

    saved = {_digest(t) for file in folder.glob("*.safetensors") for t in load_file(file).values()}
    trained = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
    adapter = adapter_state(model, state)  # has different names, and under AdaLoRA different shapes
    lost = [name for name, p in trained.items() if not adapter and _digest(p) not in saved]
    lost += [name for name, tensor in adapter.items() if _digest(tensor) not in saved]
    lost += [n for n, p in trained.items() if adapter and saved_name(n) not in adapter and _digest(p) not in saved]
    if lost:
        raise CheckpointError(f"{folder}: the saved files do not hold the trained value of {lost[0]}")


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()
