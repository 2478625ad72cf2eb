"""Features of frozen image encoders, computed once per image and run, sweep or machine.

With the vision tower and the projector frozen, what the language model sees of an image never changes. It is kept
under the image's content and a fingerprint of everything it depends on: weights, processor, number types, versions.

Each image is computed by itself, so that its features don't depend on the batch in which it came first, and a resumed
run sees the numbers of a straight one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlmtune.config import DataConfig
from vlmtune.data.images import content_key
from vlmtune.models.parts import Parts, base_of

FROZEN = ("vision", "projector")
"""Parts whose weights an image's features depend on."""


@dataclass(frozen=True)
class Entry:
    """What stands for the images that a prompt shows together."""

    inputs: dict[str, Tensor]
    """Processor outputs that the language model needs besides the features: the grids of mRoPE."""
    expansions: list[str]
    """The text of each image in the prompt."""
    pooled: list[Tensor]
    """Features [tokens, hidden] of each image, or of each tile."""
    stacked: bool
    """Whether the model hands its features on as one tensor, not as a list."""
    deepstack: list[list[Tensor]]
    """Per layer that gets features of its own (Qwen3-VL): as `pooled`."""

    @property
    def size(self) -> int:
        """Bytes."""
        features = [*self.pooled, *(t for layer in self.deepstack for t in layer)]
        return sum(t.nbytes for t in features)


class EncoderOutputs(dict[str, Any]):
    """The models' own argument `mm_encoder_outputs`, movable like a tensor."""

    def to(self, device: torch.device, non_blocking: bool = False) -> EncoderOutputs:
        return self._mapped(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncoderOutputs:
        return self._mapped(lambda t: t.pin_memory())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> EncoderOutputs:
        def each(value: Any) -> Any:
            return [each(v) for v in value] if isinstance(value, list) else move(value)

        return EncoderOutputs(
            {kind: SimpleNamespace(**{k: each(v) for k, v in vars(out).items()}) for kind, out in self.items()}
        )


def joined(entries: Sequence[Entry]) -> tuple[dict[str, Any], list[str]]:
    """Model inputs and expansions of several entries, as `Family.images` gives them with pixels."""
    if not entries:
        return {}, []
    pooled = [t for entry in entries for t in entry.pooled]
    output: dict[str, Any] = {"pooler_output": torch.cat(pooled) if entries[0].stacked else pooled}
    if entries[0].deepstack:
        layers = range(len(entries[0].deepstack))
        output["deepstack_features"] = [[t for entry in entries for t in entry.deepstack[n]] for n in layers]
    inputs: dict[str, Any] = {key: torch.cat([e.inputs[key] for e in entries]) for key in entries[0].inputs}
    inputs["mm_encoder_outputs"] = EncoderOutputs(image=SimpleNamespace(**output))
    return inputs, [text for entry in entries for text in entry.expansions]


@dataclass
class Store:
    """Entries under one fingerprint, in memory up to a budget and in a folder if one is given."""

    folder: Path | None = None
    entries: dict[Hashable, Entry] = field(default_factory=dict)
    bytes: int = 0

    def get(self, key: str, budget: float) -> Entry | None:
        entry = self.entries.get(key)
        if entry is None and self.folder is not None and (path := self._path(key)).exists():
            entry = read_entry(path)
            self._keep(key, entry, budget)
        return entry

    def put(self, key: str, entry: Entry, budget: float) -> None:
        self._keep(key, entry, budget)
        if self.folder is not None:
            write_entry(self._path(key), entry)

    def _keep(self, key: str, entry: Entry, budget: float) -> None:
        if self.bytes + entry.size <= budget:
            self.entries[key] = entry
            self.bytes += entry.size

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


STORES: dict[tuple[str, Path | None], Store] = {}
"""Of this process: the trials of a sweep share what does not differ between them."""


class Features:
    """Looks images up, and computes what is missing with the model's own encoder."""

    def __init__(self, model: Any, parts: Parts, processor: Any, config: DataConfig, engine: Any):
        self.model, self.engine = base_of(model), engine
        self.budget = config.cache_gb * 1e9
        folder = None
        mark = fingerprint(self.model, parts, processor, engine, config.fast_jpeg)
        if config.cache_features == "disk":
            folder = Path(config.cache_folder or default_folder()).expanduser() / "features" / mark
        self.store = STORES.setdefault((mark, folder), Store(folder))
        self.computed, self.found, self.seconds = 0, 0, 0.0

    def of(
        self,
        shown: Sequence[tuple[Sequence[Any], Sequence[Callable[[], Any]]]],
        images: Callable[[list[list[Any]]], tuple[dict[str, Any], list[str]]],
    ) -> tuple[dict[str, Any], list[str]]:
        """Inputs and expansions of images in groups of what a prompt shows together: their sources, and functions that
        open them. `images` makes the processor's tensors of opened groups.
        """
        return joined([self._entry(sources, opened, images) for sources, opened in shown])

    def _entry(self, sources: Sequence[Any], opened: Sequence[Callable[[], Any]], images: Callable[..., Any]) -> Entry:
        keys = [content_key(source) for source in sources]
        key = keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()
        entry = self.store.get(key, self.budget)
        if entry is not None:
            self.found += 1
            return entry
        began = time.perf_counter()
        entry = self.compute(*images([[each() for each in opened]]))
        self.store.put(key, entry, self.budget)
        self.computed += 1
        self.seconds += time.perf_counter() - began
        return entry

    @torch.no_grad()
    def compute(self, inputs: dict[str, Any], expansions: list[str]) -> Entry:
        """One entry from the processor's tensors."""
        encode = self.model.base_model.get_image_features
        taken = inspect.signature(encode).parameters
        arguments = {key: value.to(self.engine.device) for key, value in inputs.items() if key in taken}
        with self.engine.autocast():
            output = encode(**arguments, return_dict=True)
        pooled, deepstack = output.pooler_output, getattr(output, "deepstack_features", None) or []
        stacked = isinstance(pooled, Tensor)
        return Entry(
            {key: value for key, value in inputs.items() if key.endswith("_grid_thw")},
            expansions,
            [_kept(t) for t in ([pooled] if stacked else pooled)],
            stacked,
            [[_kept(t) for t in layer] for layer in deepstack],
        )

    def report(self) -> str:
        """What the cache cost and gained."""
        each = self.seconds / max(self.computed, 1)
        size = self.store.bytes / 1e6
        return (
            f"image features: {self.computed} computed in {self.seconds:.1f} s, {self.found} times found again "
            f"(about {each * self.found:.0f} s saved), {size:.0f} MB in memory"
        )


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def refusal(model: Any, parts: Parts) -> str | None:
    """Why features of this model can't be kept, or None where they can."""
    base = base_of(model)
    if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        return f"{type(base).__name__} takes no features in place of pixels"
    trained = {parts.of(name) for name, p in model.named_parameters() if p.requires_grad} & set(FROZEN)
    if trained:
        return f"the {' and the '.join(sorted(trained))} train"
    for name, module in base.named_modules():
        if parts.of(name) in FROZEN and _varies(module):
            return f"{name} ({type(module).__name__}) gives an image other features each time"
    return None


def _varies(module: torch.nn.Module) -> bool:
    """Whether a module in training mode depends on chance or on the rest of the batch."""
    chances = ("p", "drop_prob", "attention_dropout", "dropout")
    at_random = any(isinstance(p := getattr(module, name, None), float) and p > 0 for name in chances)
    return at_random or isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def fingerprint(model: Any, parts: Parts, processor: Any, engine: Any, fast_jpeg: bool = True) -> str:
    """A hash of all that an image's features depend on, the image excepted."""
    import transformers

    image_processor = processor.image_processor
    described = [
        transformers.__version__,
        torch.__version__,
        type(model).__name__,
        type(image_processor).__name__,
        json.dumps(image_processor.to_dict(), sort_keys=True, default=str),
        json.dumps({k: v for k, v in vars(processor).items() if isinstance(v, int | float | str | bool)}, default=str),
        str(engine.mixed_precision),
        engine.device.type,
        str(fast_jpeg),
    ]
    digest = hashlib.sha256("\n".join(described).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and parts.of(name) in FROZEN:
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vlmtune"


# ---------------------------------------------------------------- files


def write_entry(path: Path, entry: Entry) -> None:
    """A safetensors file, complete or absent."""
    from safetensors.torch import save_file

    tensors = {f"inputs.{key}": value.contiguous() for key, value in entry.inputs.items()}
    tensors |= {f"pooled.{n:04d}": t for n, t in enumerate(entry.pooled)}
    tensors |= {f"deepstack.{n:04d}.{m:04d}": t for n, row in enumerate(entry.deepstack) for m, t in enumerate(row)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, part, {"expansions": json.dumps(entry.expansions), "stacked": json.dumps(entry.stacked)})
    os.replace(part, path)


def read_entry(path: Path) -> Entry:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    layers: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("deepstack."):
            layers.setdefault(key.split(".")[1], []).append(value)
    return Entry(
        {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")},
        json.loads(metadata["expansions"]),
        [value for key, value in tensors.items() if key.startswith("pooled.")],
        json.loads(metadata["stacked"]),
        [layers[layer] for layer in sorted(layers)],
    )
