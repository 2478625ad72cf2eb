"""The adapter that a run or another program has saved in PEFT's format, put on its base model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune import durable
from vlmtune.config.adapter_source import CONFIG, WEIGHTS, folder_of, read_json
from vlmtune.config.installed import NOT_FOR_USERS
from vlmtune.config.schema import Config
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.models.parts import Parts, base_files
from vlmtune.models.peft_config import config_class, field_names
from vlmtune.packages import without_bitsandbytes

log = logging.getLogger("vlmtune")


@without_bitsandbytes()
def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter saved in `folder`, to answer with.

    Raises CheckpointError where a weight of the adapter finds no place in the model or the other way round: PEFT would
    only warn, and leave a random adapter.
    """
    from peft import PeftModel

    refuse_code(folder)
    with _fitting(folder), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted = PeftModel.from_pretrained(model, folder)
    if lost := _homeless(adapted, folder):
        raise CheckpointError(f"{folder}: the adapter does not fit this model: no place for {', '.join(lost[:3])}")
    return adapted


@without_bitsandbytes()
def load_beside(adapted: Any, folder: Path, name: str) -> None:
    """Load the adapter saved in `folder` under `name`, beside those that `adapted` has. It does not become the active
    one. Raises CheckpointError as `load_adapter` does.
    """
    refuse_code(folder)
    device = str(next(adapted.parameters()).device)
    with _fitting(folder), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted.load_adapter(folder, name, torch_device=device)
    if lost := _homeless(adapted, folder, name):
        raise CheckpointError(f"{folder}: the adapter does not fit this model: no place for {', '.join(lost[:3])}")


def source_of(config: Config) -> Path | None:
    """The folder of the adapter that a run starts from; None for a new adapter, and for a resumed run, whose checkpoint
    holds the weights.
    """
    return None if config.adapter.from_ is None or config.resume else folder_of(Path(config.adapter.from_))


def check_source(config: Config) -> None:
    """Raise CheckpointError where the adapter that a run starts from is damaged, or could run code."""
    if (folder := source_of(config)) is not None:
        refuse_code(folder)
        if (folder / durable.SUMS).exists():  # another program writes none
            durable.verify(folder)


def check_base(model: Any, config: Config, folder: Path) -> None:
    """Raise ConfigError where the adapter in `folder` was trained over other base weights than those of `model`.

    A run noted a hash of them. Of an adapter from elsewhere only the name of its base is known: another one is logged.
    """
    theirs, ours = read_json(folder / CONFIG).get("base_model_name_or_path"), config.model.path
    file = folder.parent / "environment.json"
    noted = read_json(file).get("base_model") if file.is_file() else None
    key = f"adapter.from={config.adapter.from_}"
    if noted is not None and noted != (own := base_files(model, str(ours))):
        raise ConfigError(
            f"{key}: was trained over the base model {theirs} ({noted}), and model.path={ours} ({own}) is another one; "
            "set model.path and model.revision to those of that run"
        )
    if noted is None and theirs != ours:
        log.warning("%s: names %s as its base model, and this run has %s; they must be the same", key, theirs, ours)


PLACES = {"target_modules", "target_parameters", "feedforward_modules", "layers_to_transform", "layers_pattern"}
"""Fields that say where an adapter is placed. The names of its weights tell it too."""


def start_from(adapted: Any, folder: Path, parts: Parts, scope: list[str]) -> None:
    """Load the weights of the adapter in `folder` into the new adapter of `adapted`, which is on the parts `scope`.

    Raises CheckpointError where the two differ in a field of PEFT's config, or in their weights' names or shapes.
    """
    own = adapted.peft_config["default"]
    method = own.peft_type.value.lower()
    saved = config_class(method).from_pretrained(folder)
    for name in sorted(field_names(method) - NOT_FOR_USERS - PLACES):
        was, now = getattr(saved, name), getattr(own, name)
        if was != now and "dropout" not in name:
            raise CheckpointError(f"{folder / CONFIG}: {name} is {was}, and this run has adapter.{name}={now}")
    with _fitting(folder):
        found = adapted.load_adapter(folder, "default", is_trainable=True, torch_device="cpu")
        if found.missing_keys:
            raise KeyError(f"it has no {found.missing_keys[0]}")
    if lost := _homeless(adapted, folder):
        others = sorted({parts.of(name) for name in lost} - {*scope})
        way = f"; add {' and '.join(others)} to adapter.parts={scope}" if others else ""
        raise CheckpointError(f"{folder}: the adapter does not fit this run's: no place for {lost[0]}{way}")
    log.info("the adapter starts with the weights in %s", folder)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Say in one sentence what PEFT raises where the adapter in `folder` does not fit, or is damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: is damaged: {error}; restore the file") from error
    except (Warning, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{folder}: the adapter does not fit this model: {reason}") from error


def _homeless(adapted: Any, folder: Path, name: str = "default") -> list[str]:
    """Names of the weights in `folder` that have no place in the adapter `name`: PEFT would leave them out."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sorted(set(file.keys()) - set(get_peft_model_state_dict(adapted, adapter_name=name)))


def refuse_code(folder: Path) -> None:
    """PEFT would unpickle adapter_model.bin, and import the package that `megatron_core` names."""
    if not (folder / WEIGHTS).is_file():
        found = "; it has adapter_model.bin, which may carry code: save it again as safetensors"
        raise CheckpointError(f"{folder}: has no {WEIGHTS}{found * (folder / 'adapter_model.bin').exists()}")
    named = read_json(folder / CONFIG).get("megatron_core")
    if named not in (None, "megatron.core"):
        raise CheckpointError(f"{folder / CONFIG}: megatron_core={named} would run code; remove that line")
