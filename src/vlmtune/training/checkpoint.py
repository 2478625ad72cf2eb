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
from vlmtune.models.sharding import share_of
from vlmtune.record.progress import Progress
from vlmtune.training import resume
from vlmtune.training.snapshot import Snapshot, join_state, trained_tensors

log = logging.getLogger("vlmtune")

NAME = re.compile(r"step_\d{6,}")
DAMAGED = ".damaged"
"""Suffix for the name of a damaged checkpoint that was skipped."""


def write(root: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write `root/step_000123`, then delete all but the `keep` newest checkpoints and the best one."""
    folder = _of_step(root, snapshot.step)
    with whole(folder) as partial:
        for file, tensors in snapshot.tensors.items():
            save_file(tensors, partial / f"{file}.safetensors")
        (partial / "state.json").write_text(snapshot.state)
    kept = {folder, *all_checkpoints(root)[-keep:]}
    if snapshot.best_step is not None:
        kept.add(_of_step(root, snapshot.best_step))
    for old in all_checkpoints(root):
        if old not in kept:
            durable.remove(old)
    return folder


def _of_step(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


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
            log.warning("%s: is no folder with the name of a checkpoint; ignored", stray)
    for folder in reversed(known):
        try:
            check(folder)
        except CheckpointError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
            problems += error.problems
        else:
            return folder
    if not problems:
        raise CheckpointError(resume.nothing_saved(run))
    way = f"put a sound copy of one back, or delete {root} and start the same command again with resume=auto"
    raise CheckpointError([f"{run}: no usable checkpoint: {way}", *problems])


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
    durable.verify(folder, needed=("model.safetensors", "optimizer.safetensors", "state.json"))
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
        counts = (progress.step, progress.first_total or 0, progress.examples, progress.tokens, progress.skipped)
        numbers = (*counts, progress.seconds)
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its progress has a value that is not a number")
    except (OSError, ValueError, KeyError, RecursionError) as error:
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
    was = state["identity"]
    changes = resume.changes(folder, was, identity, progress.step, since_best=progress.since_best)
    progress.changes += changes
    if any(change["key"] == "trainer.batch_size" for change in changes):
        progress.halvings = 0
    progress.first_total = progress.first_total or was.get("steps in all")  # an older version did not note it
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
