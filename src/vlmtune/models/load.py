"""Open a vision-language model from the hub or a folder, and say clearly what is missing when that fails."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmtune import durable
from vlmtune.config import Config, ModelConfig
from vlmtune.errors import CheckpointError, ConfigError, ModelError
from vlmtune.models.image_budget import fit_model
from vlmtune.models.parts import find_parts
from vlmtune.models.processors import hub_options, is_original_internvl2, load_processor, remote
from vlmtune.models.quantization import keep_trainable_on_cpu, quantization_config
from vlmtune.models.rewrites import rewrite

log = logging.getLogger("vlmtune")


def load(
    config: ModelConfig,
    quantization: dict[str, Any],
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, Any]:
    """The model, on `device` in `dtype` with the asked parts quantized, and its processor.

    Raises ModelError: no such model, no network, no licence, damaged files; ConfigError: a value that doesn't fit it.
    """
    with explained(config):
        ask_hub(config)
        processor = load_processor(config)
        model = _load_model(config, quantization, dtype, compute_dtype, device, processor)
    if quantization["method"] is not None and device.type == "cpu":
        keep_trainable_on_cpu(model)
    if rewritten := rewrite(model, device, compute_dtype):
        log.info("on a CPU: %s", ", ".join(rewritten))
    return model, processor


def ask_hub(config: ModelConfig) -> None:
    """Ask the hub once for the model before downloads begin: without network those retry for half a minute."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    path = str(config.path)
    if Path(path).is_dir() or looks_local(path) or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(path, "config.json", revision=config.revision or "main"), str):
        return
    try:
        HfApi().model_info(path, revision=config.revision, timeout=10)
    except OSError:
        raise
    except Exception as error:  # the HTTP library's own errors of connecting
        raise OSError(f"can't connect to the hub: {error}") from error


def _load_model(
    config: ModelConfig,
    quantization: dict[str, Any],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    processor: Any,
) -> Any:
    options = hub_options(config)
    cls, architecture = _architecture(config, processor)
    fit_model(architecture, processor)
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if quantization["method"] is not None:
        with torch.device("meta"):
            skeleton = cls._from_config(architecture) if hasattr(cls, "_from_config") else cls.from_config(architecture)
        options["quantization_config"] = quantization_config(quantization, find_parts(skeleton), compute_dtype)
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
    for problem in ("missing", "mismatched"):
        names = sorted(str(key[0]) if isinstance(key, tuple) else key for key in report[f"{problem}_keys"])
        if names:
            what = "missing from its files" if problem == "missing" else "of another shape in its files"
            raise ModelError(f"{config.path}: {len(names)} weights are {what}, among them {', '.join(names[:3])}")
    return model


def _architecture(config: ModelConfig, processor: Any) -> tuple[Any, Any]:
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
        raise ConfigError("model.save_layout=original: this checkpoint is no InternVL2 in its own layout; use native")
    return AutoModelForImageTextToText, AutoConfig.from_pretrained(config.path, **hub_options(config))


def make_fresh(config: ModelConfig, folder: Path, seed: int, engine: Any) -> None:
    """Have the first rank write an untrained model with the function that `model.fresh` names, unless a resumed run has
    one already; point `config.path` at it.
    """
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


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers and the hub raise while loading into one sentence with the way out."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from safetensors import SafetensorError

    path = config.path
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, httpx.HTTPError) as error:
        causes = list(_chain(error))
        text = " ".join(str(cause) for cause in causes)
        page = f"https://huggingface.co/{path}"

        def caused_by(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)

        if "trust_remote_code" in text:
            raise ModelError(
                f"{path}: carries Python code of its own; read it, then set model.trust_remote_code=true to run it"
            ) from error
        if Path(str(path)).is_dir():
            raise ModelError(f"{path}: can't be opened: {_first_line(error)}") from error
        if looks_local(str(path)):
            raise ModelError(f"model.path={path}: no such folder") from error
        if caused_by(GatedRepoError) or "gated repo" in text:
            raise ModelError(
                f"{path} is gated: accept its licence on {page}, then log in once with `hf auth login` "
                "(or set HF_TOKEN)"
            ) from error
        if caused_by(RevisionNotFoundError):
            raise ModelError(
                f"model.revision={config.revision}: {path} has no such revision; see {page}/commits"
            ) from error
        offline = caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, httpx.TransportError)
        if offline or "couldn't connect" in text:
            raise ModelError(
                f"{path}: is not in the local cache, and the hub can't be reached. Connect once, or fetch it elsewhere "
                f"with `hf download {path}` and give the folder: model.path=FOLDER"
            ) from error
        if caused_by(RepositoryNotFoundError):
            raise ModelError(
                f"{path}: no such model on the hub, or a private one: check the name, or log in with `hf auth login`"
            ) from error
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), error)
        raise ModelError(f"{path}: can't be opened: {_first_line(answer)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def load_trained(
    folder: Path, config: Config, *, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """The model that a run left in `folder/model`, ready to answer, and its processor.

    Raises CheckpointError where the run saved none.
    """
    from vlmtune.models.adapters import load_adapter

    saved = durable.existing(folder / "model")
    if not saved.is_dir():
        raise CheckpointError(f"{folder}: this run has not saved a model; its result.json says why")
    durable.verify(saved)
    types = {"dtype": dtype, "compute_dtype": compute_dtype}
    if not config.uses_adapter:
        own = dataclasses.replace(config.model, path=str(saved))
        model, processor = load(own, config.quantization, device=device, **types)
    else:
        base = dataclasses.replace(config.model, path=str(folder / "base")) if config.model.fresh else config.model
        model, processor = load(base, config.quantization, device=device, **types)
        model = load_adapter(model, saved)
    return model.eval(), processor
