"""A run's state on disk: written completely or not at all.

A checkpoint holds the trainable weights, the optimizer's state and the progress, all in safetensors and JSON, so that
loading one never runs code. Random numbers follow from seed, step and rank: nothing of them is saved.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune import durable
from vlmtune.durable import whole
from vlmtune.errors import CheckpointError
from vlmtune.models.sharding import full, share_of
from vlmtune.record.progress import Progress
from vlmtune.training import resume

log = logging.getLogger("vlmtune")

NAME = re.compile(r"step_\d{6,}")
DAMAGED = ".damaged"
"""Suffix for the name of a damaged checkpoint that was skipped."""


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Everything in a model that training changes: trainable weights and saved buffers."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | saved_buffers(model)


def saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that a model saves with its weights, such as a batch norm's averages: training may change them."""
    saved = set()
    for prefix, module in model.named_modules():
        own = set(module._buffers) - module._non_persistent_buffers_set
        saved |= {f"{prefix}.{name}" if prefix else name for name in own}
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors and the rest, which JSON can hold. Keys are paths, since
    bitsandbytes nests its state.
    """
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


def save_checkpoint(
    root: Path,
    model: torch.nn.Module,
    optimizer: Any,
    scaler: Any,
    progress: Progress,
    identity: dict[str, Any],
    *,
    keep: int,
    writes: bool = True,
) -> Path:
    """Write `root/step_000123`, then delete all but the `keep` newest checkpoints and the best one.

    `identity`: what a run that resumes from here is compared with (`resume.identity`). `writes`: or this process only
    contributes its share of a sharded model.
    """
    folder = root / f"step_{progress.step:06d}"
    moments, rest = split_state(optimizer.state_dict())
    weights, moments = _plain(trained_tensors(model)), _plain(moments)
    if not writes:
        return folder
    state = {"progress": dataclasses.asdict(progress), "identity": identity, "optimizer": rest}
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    with whole(folder) as partial:
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    for old in all_checkpoints(root)[:-keep]:
        if progress.best_step is None or old.name != f"step_{progress.best_step:06d}":
            durable.remove(old)
    return folder


def all_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in root.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def newest(run: Path) -> Path:
    """The newest undamaged checkpoint of a run; damaged ones are skipped with a warning.

    Raises CheckpointError if there is none, saying what is wrong with each.
    """
    root = run / "checkpoints"
    known, problems = all_checkpoints(root), []
    for stray in sorted({*root.glob("step_*")} - {*known}):
        if not stray.name.endswith(DAMAGED):
            log.warning("%s: does not have the name of a checkpoint; ignored", stray)
    for folder in reversed(known):
        try:
            check(folder)
        except CheckpointError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
            problems += error.problems
        else:
            return folder
    raise CheckpointError([f"{run}: no usable checkpoint", *problems] if problems else resume.nothing_saved(run))


def set_aside(damaged_since: Path) -> None:
    """Rename the damaged checkpoints that are newer than this one, so that none counts as the newest again."""
    for folder in all_checkpoints(damaged_since.parent):
        if _step(folder) > _step(damaged_since):
            aside = folder.with_name(folder.name + DAMAGED)
            durable.remove(aside) if aside.exists() else None
            folder.rename(aside)
            log.warning("%s: renamed to %s", folder, aside.name)


def check(folder: Path) -> None:
    """Raise CheckpointError if a file of a checkpoint is missing or damaged, naming the file."""
    durable.verify(folder)
    _read_state(folder)
    for name in ("model", "optimizer"):
        file = folder / f"{name}.safetensors"
        with _explained(file), safe_open(file, "pt"):  # also finds truncated files in checkpoints without checksums
            pass


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file.parent}: is not a checkpoint: {file.name}: {error}") from error


def _read_state(folder: Path) -> tuple[dict[str, Any], Progress]:
    """The content of state.json, and the progress in it."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it does not hold a JSON object")
        for name in ("progress", "identity", "optimizer"):
            if not isinstance(state[name], dict):
                raise ValueError(f"its {name} is not an object")
        if missing := {"values", "param_groups"} - state["optimizer"].keys():
            raise ValueError(f"its optimizer lacks {min(missing)}")
        if strange := state["progress"].keys() - {field.name for field in dataclasses.fields(Progress)}:
            raise ValueError(f"its progress has the unknown key {min(strange)!r}")
        progress = Progress(**state["progress"])
        numbers = (progress.step, progress.examples, progress.tokens, progress.seconds, progress.skipped)
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its progress has a value that is not a number")
    except (OSError, ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder}: is not a checkpoint: state.json: {reason}") from error
    if progress.step != _step(folder):
        raise CheckpointError(f"{folder}: does not match its name: it holds step {progress.step}")
    return state, progress


def _read(file: Path) -> dict[str, Tensor]:
    with _explained(file):
        return dict(load_file(file))


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load a checkpoint's weights into `model`. Raises CheckpointError if they don't match the model's."""
    saved, own = _read(folder / "model.safetensors"), trained_tensors(model)
    odd = sorted(
        n for n in saved.keys() | own.keys() if n not in saved or n not in own or saved[n].shape != own[n].shape
    )
    if odd:
        names = ", ".join(odd[:3])
        raise CheckpointError(f"{folder}: its weights are not those that this run trains, for instance {names}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(share_of(saved[name], tensor))


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: Any, scaler: Any, identity: dict[str, Any]
) -> Progress:
    """Restore everything, so that the next step is the one that would have followed.

    Changed config keys take effect and are recorded in the progress. Raises CheckpointError if this run would not
    be a continuation of that one.
    """
    state, progress = _read_state(folder)
    progress.changes += resume.changes(folder, state["identity"], identity, progress.step)
    load_weights(folder, model)
    _load_optimizer(folder, optimizer, state["optimizer"])
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    return progress


def _load_optimizer(folder: Path, optimizer: Any, saved: dict[str, Any]) -> None:
    """Load the moments from a checkpoint; learning rates, weight decay and betas come from this run's config."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        state = join_state(_read(folder / "optimizer.safetensors"), saved)
        for index, values in state["state"].items():
            state["state"][index] = _shares(values, weights[index])
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{folder}: holds the state of a different optimizer: {error}") from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group |= values


def _shares(state: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """What this process keeps of a weight's state."""
    return {name: share_of(value, weight) if isinstance(value, Tensor) else value for name, value in state.items()}
