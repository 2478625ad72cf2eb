"""What images become on their way to the language model, made once per image and kept: the processor's tensors
(`PixelStore`), or features of a frozen encoder (features.py).

Entries lie under the image's content and a mark of everything else that they depend on. Each image is worked on as if
by itself, so that what is kept does not depend on the batch in which it came first, and a resumed run sees the numbers
of a straight one.
"""

from __future__ import annotations

import hashlib
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

from vlmtune.config.schema import DataConfig
from vlmtune.data.images import content_key
from vlmtune.prompt.cache_folder import CacheFolder, Entry


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
    """Model inputs and expansions of several entries, as `Family.images` gives them for all at once."""
    if not entries:
        return {}, []
    inputs: dict[str, Any] = {key: _stacked([e.inputs[key] for e in entries]) for key in entries[0].inputs}
    if pooled := [t for entry in entries for t in entry.pooled]:
        output: dict[str, Any] = {"pooler_output": torch.cat(pooled) if entries[0].stacked else pooled}
        if entries[0].deepstack:
            layers = range(len(entries[0].deepstack))
            output["deepstack_features"] = [[t for entry in entries for t in entry.deepstack[n]] for n in layers]
        inputs["mm_encoder_outputs"] = EncoderOutputs(image=SimpleNamespace(**output))
    return inputs, [text for entry in entries for text in entry.expansions]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors [n, ...] one after the other, the smaller ones with zeros behind: processors fill up missing tiles so."""
    sizes = [max(each) for each in zip(*(t.shape[1:] for t in tensors), strict=True)]

    def filled(tensor: Tensor) -> Tensor:
        if list(tensor.shape[1:]) == sizes:
            return tensor
        out = tensor.new_zeros(len(tensor), *sizes)
        out[tuple(slice(n) for n in tensor.shape)] = tensor
        return out

    return torch.cat([filled(tensor) for tensor in tensors])


@dataclass
class Store:
    """Entries under one fingerprint, in memory up to a budget and in a folder if one is given."""

    folder: CacheFolder | None = None
    entries: dict[Hashable, Entry] = field(default_factory=dict)
    bytes: int = 0

    def get(self, key: str, budget: float) -> Entry | None:
        entry = self.entries.get(key)
        if entry is None and self.folder is not None:
            entry = self.folder.get(key)
            if entry is not None:
                self._keep(key, entry, budget)
        return entry

    def put(self, key: str, entry: Entry, budget: float) -> None:
        self._keep(key, entry, budget)
        if self.folder is not None:
            self.folder.put(key, entry)

    def _keep(self, key: str, entry: Entry, budget: float) -> None:
        if self.bytes + entry.size <= budget:
            self.entries[key] = entry
            self.bytes += entry.size


STORES: dict[tuple[str, Path | None], Store] = {}
"""Of this process, the present one: the trials of a sweep share what does not differ between them."""


class PixelStore:
    """The processor's tensors of images."""

    kind = "pixels"

    def __init__(self, mark: str, config: DataConfig):
        """`mark`: a hash of all that an entry depends on, the image excepted."""
        self.budget = config.cache_gb * 1e9
        folder = None
        if config.cache_features == "disk":
            folder = Path(config.cache_folder or default_folder()).expanduser() / self.kind / mark
        if (mark, folder) not in STORES:
            STORES.clear()
            STORES[mark, folder] = Store(None if folder is None else CacheFolder(folder))
        self.store = STORES[mark, folder]
        self.computed, self.found, self.seconds = 0, 0, 0.0

    def of(
        self,
        shown: Sequence[tuple[Sequence[Any], Sequence[Callable[[], Any]]]],
        images: Callable[[list[list[Any]]], tuple[dict[str, Any], list[str]]],
    ) -> tuple[dict[str, Any], list[str]]:
        """Inputs and expansions of images in groups of what a prompt shows together: their sources, and functions that
        open them. `images` makes the processor's tensors of opened groups.
        """
        found: dict[str, Entry] = {}
        missing: dict[str, Sequence[Callable[[], Any]]] = {}
        keys = [_group_key(sources, opened) for sources, opened in shown]
        for key, (_, opened) in zip(keys, shown, strict=True):
            entry = found.get(key) or self.store.get(key, self.budget)
            if entry is None:
                missing.setdefault(key, opened)
            else:
                found[key] = entry
        began = time.perf_counter()
        made = self.compute([images([[each() for each in opened]]) for opened in missing.values()])
        for key, entry in zip(missing, made, strict=True):
            self.store.put(key, entry, self.budget)
            found[key] = entry
        self.seconds += time.perf_counter() - began
        self.computed += len(missing)
        self.found += len(keys) - len(missing)
        return joined([found[key] for key in keys])

    def compute(self, processed: Sequence[tuple[dict[str, Any], list[str]]]) -> list[Entry]:
        """Entries from the processor's tensors and expansions of each group."""
        return [Entry(*each) for each in processed]

    def report(self) -> str:
        """What the cache cost and gained."""
        each = self.seconds / max(self.computed, 1)
        size = self.store.bytes / 1e6
        return (
            f"image {self.kind}: {self.computed} computed in {self.seconds:.1f} s, {self.found} times found again "
            f"(about {each * self.found:.0f} s saved), {size:.0f} MB in memory"
        )


def _group_key(sources: Sequence[Any], opened: Sequence[Callable[[], Any]]) -> str:
    keys = [_key(source, each) for source, each in zip(sources, opened, strict=True)]
    return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()


def _key(source: Any, opened: Callable[[], Any]) -> str:
    """Equal for equal images: of a file's bytes, else of the opened picture, as a function may give another one each
    time.
    """
    if not isinstance(source, Path | bytes):
        picture = opened()
        return hashlib.sha256(f"{picture.size}{picture.mode}".encode() + picture.tobytes()).hexdigest()
    try:
        return content_key(source)
    except OSError:
        opened()  # says what is wrong with the file, and which row shows it
        raise


def pixels_mark(processor: Any, fast_jpeg: bool) -> str:
    """A hash of all that the processor's tensors depend on, the image excepted."""
    import transformers

    image_processor = processor.image_processor
    settings = {key: value for key, value in vars(processor).items() if isinstance(value, int | float | str | bool)}
    described = [
        transformers.__version__,
        torch.__version__,
        type(processor).__name__,
        type(image_processor).__name__,
        json.dumps(image_processor.to_dict(), sort_keys=True, default=str),
        json.dumps(settings, sort_keys=True),
        str(fast_jpeg),
    ]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:32]


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vlmtune"
