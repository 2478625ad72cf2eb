"""A run's state on disk: complete or absent, never half.

A checkpoint holds the trainable weights, the optimizer's state, the random state of each rank and the progress, all in
safetensors and JSON: nothing in it can run code when it is read.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.config import ModelConfig
from vlmtune.errors import CheckpointError
from vlmtune.loop import Progress


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` only once everything is in it; an older one is replaced.

    Raises CheckpointError, with nothing of it left behind, where the disk refuses.
    """
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():  # aside, not away, until the new one is there
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CheckpointError(f"{folder}: can't be written: {reason}; earlier checkpoints are untouched") from error
    except SafetensorError as error:
        if "No space left" in str(error):
            raise CheckpointError(
                f"{folder}: can't be written: the disk is full; earlier checkpoints are untouched"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(folder)


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Everything in a model that training changes: trainable weights and saved buffers."""
    saved = _persistent(model)
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers


def _persistent(model: torch.nn.Module) -> set[str]:
    names = set()
    for prefix, module in model.named_modules():
        own = set(module._buffers) - module._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors and the JSON-able rest; keys are paths, as bitsandbytes nests its own."""
    flat = dict(_leaves(state["state"]))
    tensors = {path: value for path, value in flat.items() if isinstance(value, Tensor)}
    rest = {path: value for path, value in flat.items() if path not in tensors}
    return tensors, {"values": rest, "param_groups": state["param_groups"]}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def join_state(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split_state`."""
    state: dict[int, dict[str, Any]] = {}
    for path, value in [*tensors.items(), *rest["values"].items()]:
        index, *inner, name = path.split(".")
        place = state.setdefault(int(index), {})
        for key in inner:
            place = place.setdefault(key, {})
        place[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def random_state() -> dict[str, Tensor]:
    """The random state of this process: torch on the CPU and on the current accelerator."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def save_checkpoint(
    root: Path,
    model: torch.nn.Module,
    optimizer: Any,
    scaler: Any,
    progress: Progress,
    identity: dict[str, Any],
    random_states: list[dict[str, Tensor]],
    *,
    keep: int,
) -> Path:
    """Write `root/step_000123`, then delete all but the `keep` newest and the best one.

    `identity`: what must be equal for a run to go on from here (rows per step, data).
    """
    folder = root / f"step_{progress.step:06d}"
    tensors, rest = split_state(optimizer.state_dict())
    rng = {f"{rank}.{name}": t for rank, state in enumerate(random_states) for name, t in state.items()}
    state = {"progress": dataclasses.asdict(progress), "identity": identity, "optimizer": rest}
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    with whole(folder) as partial:
        save_file(_plain(trained_tensors(model)), partial / "model.safetensors")
        save_file(_plain(tensors), partial / "optimizer.safetensors")
        save_file(_plain(rng), partial / "random.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    for old in all_checkpoints(root)[:-keep]:
        if progress.best_step is None or old.name != f"step_{progress.best_step:06d}":
            shutil.rmtree(old)
    return folder


def all_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(root.glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file.parent}: is no checkpoint: {file.name}: {error}") from error


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's weights into `model`. Raises CheckpointError where they are not the model's own."""
    saved, own = _read(folder / "model.safetensors"), trained_tensors(model)
    odd = sorted(
        n for n in saved.keys() | own.keys() if n not in saved or n not in own or saved[n].shape != own[n].shape
    )
    if odd:
        raise CheckpointError(f"{folder}: holds other weights than this run trains, among them {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: Any, scaler: Any, identity: dict[str, Any], rank: int
) -> Progress:
    """Put everything back as it was, so that the next step is the one that would have followed.

    Raises CheckpointError where this run would not continue that one.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: is no checkpoint: {error}") from error
    different = [k for k, v in identity.items() if state["identity"].get(k) != v]
    if different:
        raise CheckpointError(
            [
                f"{folder}: {k} was {state['identity'].get(k)}, now {identity[k]}: this would be another run"
                for k in different
            ]
        )
    load_weights(folder, model)
    optimizer.load_state_dict(join_state(_read(folder / "optimizer.safetensors"), state["optimizer"]))
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    rng = _read(folder / "random.safetensors")
    torch.set_rng_state(rng[f"{rank}.cpu"])
    if torch.cuda.is_available() and f"{rank}.cuda" in rng:
        torch.cuda.set_rng_state(rng[f"{rank}.cuda"])
    return Progress(**state["progress"])


def save_model(model: Any, processor: Any, folder: Path, config: ModelConfig | None = None) -> None:
    """Write the adapter (or the whole model), processor and generation config, as PEFT and transformers read them, or
    in the layout that `config.save_layout` asks for.

    The written weights are opened again and compared before the folder takes its name.
    """
    from vlmtune.models.parts import base_of

    with whole(folder) as partial:
        if config is not None and config.save_layout == "original":
            from vlmtune.models.internvl2 import save_original

            save_original(model, config, partial)
            return
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        base_of(model).generation_config.save_pretrained(partial)
        _compare(model, partial)


def _compare(model: Any, folder: Path) -> None:
    """Raise CheckpointError unless the weight files in `folder` hold every trained weight, bit by bit.

    Compared by content: names change between a live model and the hub's layout.
    """
    from vlmtune.models.adapters import adapter_state, saved_name

    saved = {_digest(t) for file in folder.glob("*.safetensors") for t in load_file(file).values()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = adapter_state(model)  # has its own names, and under AdaLoRA its own shapes
    lost = [name for name, p in trained.items() if not adapter and _digest(p) not in saved]
    lost += [name for name, tensor in adapter.items() if _digest(tensor) not in saved]
    lost += [n for n, p in trained.items() if adapter and saved_name(n) not in adapter and _digest(p) not in saved]
    if lost:
        raise CheckpointError(f"{folder}: the saved files do not hold the trained value of {lost[0]}")


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()
