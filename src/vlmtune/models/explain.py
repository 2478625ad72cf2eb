"""Say in one sentence why a model can't be opened, and what would work."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vlmtune import network as hub
from vlmtune.commands import typed
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ModelError, to_install

SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Small files of a checkpoint; transformers reads on without some of them where they are damaged."""
MISSING = {
    "Can't load image processor": "has no files of an image processor (preprocessor_config.json); copy them from the "
    "original checkpoint. A text-only model has none",
    "has no image processor": "has no image processor, so it is not a vision-language model",
    "Couldn't instantiate the backend tokenizer": "has no tokenizer.json; copy it from the original checkpoint",
    "Unrecognized configuration class": "is of a type that doesn't read images, or that this transformers can't open",
    "Error while deserializing header": "its weights (*.safetensors) are cut or damaged; copy them again",
}
"""Part of what transformers says -> what it means."""
POINTER = b"version https://git-lfs"


def looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def check_place(path: str) -> None:
    """Raise ModelError where `path` is on this machine and is not a model's folder in the hub's layout."""
    place = Path(path)
    if place.is_file():
        kind = "a GGUF file, which can't be trained" if place.suffix == ".gguf" else "a file"
        raise ModelError(f"model.path={path}: is {kind}; give the folder of the checkpoint in the hub's layout")
    if not place.is_dir():
        if looks_local(path):
            raise ModelError(f"model.path={path}: no such folder")
        return
    names = {file.name for file in place.iterdir()}
    if "adapter_config.json" in names:
        raise adapter_error(path, base_of_adapter(place))
    if {"model", "config.yaml"} <= names and "config.json" not in names:
        if (place / "model" / "adapter_config.json").exists():
            raise adapter_error(f"{path}/model", base_of_adapter(place / "model"), run=path)
        raise ModelError(f"model.path={path}: is the folder of a run; its model is model.path={path}/model")
    check_names(path, names)
    for name in names.intersection(SETTINGS):
        check_settings(place / name)
    for index in place.glob("*.safetensors.index.json"):
        check_shards(index)
    for file in place.glob("*.safetensors"):
        with file.open("rb") as handle:
            if handle.read(len(POINTER)) == POINTER:
                raise ModelError(f"{file}: is a pointer of git-lfs and not the weights; run `git lfs pull` in {path}")


def check_names(path: str, names: Collection[str]) -> None:
    """Raise ModelError where these are not the files of a whole transformers model with safe weights."""
    if "model_index.json" in names:
        raise ModelError(f"{path}: is a diffusers pipeline, which makes images; give a vision-language model")
    endings = {Path(name).suffix for name in names}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise adapter_error(path, None)
        gguf = "; its GGUF files can't be trained" * (".gguf" in endings)
        raise ModelError(f"{path}: can't be opened: has no config.json{gguf}; give a checkpoint in the hub's layout")
    if ".safetensors" in endings:
        return
    pickled = sorted(name for name in names if Path(name).suffix == ".bin" and name != "training_args.bin")
    if pickled:
        raise ModelError(
            f"{path}: has its weights in {pickled[0]} only, which can run code when it is loaded; convert them once: "
            f"python -c \"import transformers as t; t.AutoModelForImageTextToText.from_pretrained('{path}')"
            f".save_pretrained('NEW')\", copy the tokenizer and processor files next to them, and set model.path=NEW"
        )
    raise ModelError(f"{path}: can't be opened: has no weights (*.safetensors) in the hub's layout")


def check_settings(file: Path) -> None:
    """Raise ModelError where a file of settings is not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file.parent}: can't be opened: {file.name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.parent}: can't be opened: {file.name} holds a {type(content).__name__}, not an object")


def check_shards(index: Path) -> None:
    """Raise ModelError where a file is missing that the index of a checkpoint in several files names."""
    try:
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: can't be opened: is damaged ({error}); copy it again") from error
    lost = sorted(name for name in wanted if not (index.parent / name).is_file())
    if lost:
        missing = f"{len(lost)} of {len(wanted)} weight files are missing, among them {lost[0]}"
        raise ModelError(f"{index.parent}: can't be opened: {missing}")


def base_of_adapter(folder: Path) -> str | None:
    """The base model that the adapter in `folder` was trained over, where its config says so."""
    try:
        return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def adapter_error(path: str, base: str | None, run: str = "RUN") -> ModelError:
    """What to do with an adapter that was given as a model."""
    whole = base or "BASE"
    return ModelError(
        f"model.path={path}: is an adapter{f' of {base}' if base else ''}, not a whole model. "
        f"To answer with it: {typed('predict')} run={run}. To train another one: model.path={whole}. "
        f"To train it further: model.path={whole} adapter.from={path}"
    )


def _missing_package(causes: list[BaseException]) -> str | None:
    """The package that an import did not find, or that transformers says is required (SmolVLM's processor)."""
    named = (re.search(r"Package `([\w-]+)` is required", str(cause)) for cause in causes)
    required = next((match[1] for match in named if match), None)
    return next((cause.name for cause in causes if isinstance(cause, ModuleNotFoundError)), required)


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers and the hub raise while loading into one sentence with the way out."""
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, ImportError, LookupError, RuntimeError, AttributeError, TypeError, SafetensorError)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*kinds, hub.http().HTTPError) as error:
        path, causes = config.path, list(hub.chain(error))
        text = " ".join(str(cause) for cause in causes)
        if missing := _missing_package(causes):
            raise ModelError(f"{path}: needs the package {missing} to be opened: {to_install(missing)}") from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"{path}: carries Python code of its own; read it, then set model.trust_remote_code=true to run it"
            ) from error
        if Path(str(path)).is_dir():
            meaning = next((said for part, said in MISSING.items() if part in text), _first_line(error))
            raise ModelError(f"{path}: can't be opened: {meaning}") from error
        raise ModelError(_of_the_hub(config, error, causes, text)) from error


def _of_the_hub(config: ModelConfig, error: BaseException, causes: list[BaseException], text: str) -> str:
    """What an error means for a model that is not in a folder. `text`: what all its causes say."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    path = config.path
    page = f"https://huggingface.co/{path}"

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(GatedRepoError) or "gated repo" in text:
        return f"{path} is gated: accept its licence on {page}, then log in once with `hf auth login` (or set HF_TOKEN)"
    if caused_by(RevisionNotFoundError):
        return f"model.revision={config.revision}: {path} has no such revision; see {page}/commits"
    if hub.unreachable(error) or "couldn't connect" in text:
        return (
            f"{path}: is not in the local cache, and the hub can't be reached. Connect once, or fetch it elsewhere "
            f"with `hf download {path}` and give the folder: model.path=FOLDER"
        )
    if caused_by(RepositoryNotFoundError):
        return f"{path}: no such model on the hub, or a private one: check the name, or log in with `hf auth login`"
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), error)
    return f"{path}: can't be opened: {_first_line(answer)}"


def _first_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if first and not isinstance(error, LookupError) else f"{type(error).__name__} {first}".strip()
