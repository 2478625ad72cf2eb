"""Open a vision-language model from the hub or a folder, and say clearly what is missing when that fails."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmtune import durable
from vlmtune.config.schema import Config, MethodConfig, ModelConfig
from vlmtune.errors import CheckpointError, ConfigError, ModelError
from vlmtune.launch.engine import Engine
from vlmtune.memory import SAVERS, noted
from vlmtune.models import attention
from vlmtune.models.explain import check_names, check_place, explained, looks_local
from vlmtune.models.parts import find_parts
from vlmtune.models.quantization import (
    check_method,
    check_quantized,
    check_stored,
    keep_trainable_on_cpu,
    quantization_config,
    quantized_bits,
    use_stored,
    whole_modules,
)
from vlmtune.models.rewrites import rewrite
from vlmtune.prompt.hub import hub_options, is_original_internvl2, remote
from vlmtune.prompt.image_budget import fit_model
from vlmtune.prompt.processors import load_processor

log = logging.getLogger("vlmtune")


@noted("while the model was loaded", useless=SAVERS.keys() - {"adapter", "quantization", "model"})
def load(
    config: ModelConfig,
    quantization: MethodConfig,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, Any]:
    """The model, on `device` in `dtype` with the asked parts quantized, and its processor.

    Raises ModelError: no such model, no network, no licence, damaged files; ConfigError: a value that doesn't fit it.
    """
    if str(config.path).startswith("~"):
        config.path = str(Path(str(config.path)).expanduser())
    check_place(str(config.path))
    with explained(config):
        ask_hub(config)
        processor = load_processor(config)
        model = _load_model(config, quantization, dtype, compute_dtype, device, processor)
    if device.type == "cpu":
        keep_trainable_on_cpu(model)
    if rewritten := rewrite(model, config.rewrites, device, compute_dtype):
        log.info("on %s: %s", "a CPU" if device.type == "cpu" else device.type, ", ".join(rewritten))
    return model, processor


def ask_hub(config: ModelConfig) -> None:
    """Ask the hub once for the model before downloads begin: without network those retry for half a minute.

    Raises ModelError where its files are not those of a whole model with safe weights, and what the hub raises.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    path = str(config.path)
    if Path(path).is_dir() or looks_local(path) or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(path, "config.json", revision=config.revision or "main"), str):
        return
    found = HfApi().model_info(path, revision=config.revision, timeout=10)
    if found.siblings:
        check_names(path, {file.rfilename for file in found.siblings})


def _load_model(
    config: ModelConfig,
    quantization: MethodConfig,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    processor: Any,
) -> Any:
    options = hub_options(config)
    cls, architecture = class_and_config(config, processor)
    fit_model(architecture, processor)
    attention.check(config, architecture, compute_dtype)
    options |= attention.options(config)
    stored = use_stored(architecture, quantization, compute_dtype)
    if quantization.method is not None:
        with torch.device("meta"):
            skeleton = cls._from_config(architecture) if hasattr(cls, "_from_config") else cls.from_config(architecture)
        skip = whole_modules(skeleton, find_parts(skeleton), quantization)
        options["quantization_config"] = quantization_config(quantization, skip, compute_dtype)
        check_method(options["quantization_config"], quantization.method, device)
    with attention.explained(config):
        model, report = cls.from_pretrained(
            config.path,
            config=architecture,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in the report, and refused below
            **options,
        )
    _check_complete(config, report)
    if quantization.method is not None:
        check_quantized(model, find_parts(model), quantization.parts)
    if stored:
        check_stored(model)
        log.info("the checkpoint is stored in %d bits and is used as it is", quantized_bits(model))
    return model


def _check_complete(config: ModelConfig, report: dict[str, Any]) -> None:
    """Raise ModelError where transformers' loading report names weights that its files lack or hold in other shapes."""
    for problem, what in (("missing", "missing from its files"), ("mismatched", "of a different shape in its files")):
        names = sorted(str(key[0]) if isinstance(key, tuple) else key for key in report[f"{problem}_keys"])
        if names:
            raise ModelError(f"{config.path}: {len(names)} weights are {what}, among them {', '.join(names[:3])}")


def class_and_config(config: ModelConfig, processor: Any) -> tuple[Any, Any]:
    """The class that opens a checkpoint, and its config."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.configuration_utils import PreTrainedConfig

    if is_original_internvl2(config):
        from vlmtune.models import internvl2

        internvl2.register()
        if config.save_layout == "original":
            internvl2.source_files(config)  # needed when the model is saved, and better missed now
        original, _ = PreTrainedConfig.get_config_dict(config.path, **remote(config))
        native = internvl2.native_config(original, processor.image_token_id)
        return internvl2.InternVL2ForConditionalGeneration, native
    if config.save_layout == "original":
        raise ConfigError(
            "model.save_layout=original: this is not an InternVL2 checkpoint in its original layout; use native"
        )
    return AutoModelForImageTextToText, AutoConfig.from_pretrained(config.path, **hub_options(config))


def make_fresh(config: ModelConfig, folder: Path, seed: int, engine: Engine) -> None:
    """Have the first rank write an untrained model with the function that `model.fresh` names, if it names one, unless
    a resumed run has one already; point `config.path` at it.
    """
    if not config.fresh:
        return
    module, _, function = str(config.fresh).rpartition(".")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.fresh={config.fresh}: {error}") from error
    if engine.is_main_process and not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")  # a kill leaves no half model with a valid name
        build(partial, seed)
        partial.rename(folder)
    engine.wait_for_everyone()
    config.path = str(folder)


def load_trained(
    folder: Path,
    config: Config,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    on_base: Callable[[Any, Any], None] = lambda model, processor: None,
) -> tuple[Any, Any]:
    """The model that a run left in `folder/model`, ready to answer and without gradients, and its processor.

    `on_base` is called with the base model and its processor before the run's adapter is put on it, if it has one.

    Raises CheckpointError where the run saved none.
    """
    from vlmtune.models.adapters import with_lora_in_one_step
    from vlmtune.models.saved_adapter import load_adapter

    saved = durable.existing(folder / "model")
    if not saved.is_dir():
        raise CheckpointError(f"{folder}: this run has not saved a model; its result.json says why")
    durable.verify(saved)
    types = {"dtype": dtype, "compute_dtype": compute_dtype}
    if not config.uses_adapter:
        own = dataclasses.replace(attention.usable(config.model, compute_dtype), path=str(saved))
        model, processor = load(own, config.quantization, device=device, **types)
    else:
        model, processor = load_base(folder, config, device=device, **types)
        on_base(model, processor)
        model = with_lora_in_one_step(load_adapter(model, saved), config.model.rewrites)
    return model.requires_grad_(False).eval(), processor


def load_base(
    folder: Path, config: Config, *, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """The model that the run in `folder` began with, and its processor."""
    given = attention.usable(config.model, compute_dtype)
    base = dataclasses.replace(given, path=str(folder / "base")) if given.fresh else given
    return load(base, config.quantization, dtype=dtype, compute_dtype=compute_dtype, device=device)
