"""`adapter.from`: a new run starts from an adapter that another run, or any other program with PEFT, has saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmtune.config import saved
from vlmtune.config.installed import NOT_FOR_USERS
from vlmtune.config.schema import home
from vlmtune.config.strict import literal, unreadable
from vlmtune.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter, as PEFT names them."""
WITHOUT_EFFECT = {"megatron_core", "qalora_group_size"}
"""Fields that PEFT writes into each LoRA's config with a value, although they belong to features that are off."""


def with_source(composed: DictConfig, overrides: Sequence[Any]) -> DictConfig:
    """`composed` with the method, parts and fields of the adapter that `adapter.from` names, if it names one.

    `overrides`: Hydra's, of the command line. They may repeat those values, set another dropout, and tell the parts
    where only PEFT's file describes the adapter. Raises ConfigError for other values, and as `folder_of` and
    `described` do.
    """
    place = OmegaConf.select(composed, "adapter.from")
    if place is None:
        return composed
    folder = Path(str(place)).expanduser().absolute()
    own = described(folder_of(folder))
    problems, kept = [], {}
    for key, (value, words) in _asked(overrides, own).items():
        free = "dropout" in key or (key == "parts" and "parts" not in own)
        if free and words == f"adapter.{key}":
            kept[key] = value
        elif own.get(key) != value:
            was, now = (text if isinstance(text, str) else json.dumps(text) for text in (own.get(key), value))
            problems.append(f"{words}={now}: the adapter in {folder} has {was}; leave it out")
    if problems:
        raise ConfigError(problems)
    changed = copy.deepcopy(composed)
    OmegaConf.update(changed, "adapter", {**own, **kept, "from": str(folder)}, merge=False, force_add=True)
    return changed


def _asked(overrides: Sequence[Any], own: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Each key of `adapter` that the command sets, by itself or with an option: its value, and how to name it.

    An option leaves the fields that only `own` sets as PEFT has them.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name in [str(o.value()) for o in overrides if o.key_or_group == "adapter"]:
        option: Any = OmegaConf.to_container(OmegaConf.load(home() / "conf" / "adapter" / f"{name}.yaml"))
        keys = [key for key in {**option, **own} if key != "parts"]
        found |= {key: (option.get(key), f"adapter={name} sets adapter.{key}") for key in keys}
    single = {o.key_or_group: o.value() for o in overrides if o.key_or_group.startswith("adapter.")}
    found |= {key.removeprefix("adapter."): (value, key) for key, value in single.items() if key != "adapter.from"}
    return found


def folder_of(place: Path) -> Path:
    """The folder of the adapter's files: `place`, or the folder `model` of the run `place`.

    Raises CheckpointError where there is no adapter, saying what else is there.
    """
    for folder in (place / "model", place):
        if (folder / CONFIG).is_file():
            return folder
    key = f"adapter.from={place}"
    if not place.is_dir():
        raise CheckpointError(
            f"{key}: no such folder; give a run, or the folder of an adapter that PEFT wrote. To get one from the hub: "
            "`hf download OWNER/NAME --local-dir FOLDER`"
        )
    for folder in (place / "model", place):
        if (folder / "config.json").is_file():
            raise CheckpointError(f"{key}: is a whole model, no adapter; start from it: model=auto model.path={folder}")
    if (place / "config.yaml").is_file():
        raise CheckpointError(f"{key}: this run has saved no model; bring it to its end first: resume={place}")
    raise CheckpointError(f"{key}: has no {CONFIG}; give a run, or the folder of an adapter that PEFT wrote")


def described(folder: Path) -> dict[str, Any]:
    """Method, parts and fields of the adapter in `folder`, as `adapter` in a config has them.

    Those of a run are in its config.yaml. Else they are those of PEFT's file, which does not know parts.
    Raises CheckpointError where they can't be read.
    """
    run = folder.parent / "config.yaml"
    if folder.name == "model" and run.is_file():
        config = saved.read(run)
        if problems := unreadable(config):
            raise CheckpointError([f"{run}: {problem}" for problem in problems])
        own: Any = OmegaConf.to_container(config)
        return {key: value for key, value in (own.get("adapter") or {}).items() if key != "from"}
    values = read_json(folder / CONFIG)
    fields = {k: v for k, v in values.items() if v not in (None, {}) and k not in NOT_FOR_USERS | WITHOUT_EFFECT}
    return literal({"method": str(values.get("peft_type")).lower(), **fields})


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it does not hold a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged: {error}") from error
    return values
