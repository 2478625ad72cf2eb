"""Caches the model inputs of images, computed once per image: the processor's tensors (`PixelStore`), or the features
of a frozen encoder (features.py).

The key of an entry is the image's content and a mark of everything else that it depends on. Each image is processed as
if alone, so that an entry does not depend on the batch in which it was computed, and a resumed run gets the same
numbers as an uninterrupted one.
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
from vlmtune.prompt.families import Process, Processed, Shown


class EncoderOutputs(dict[str, Any]):
    """The models' argument `mm_encoder_outputs`, which can be moved between devices like a tensor."""

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


def joined(entries: Sequence[Entry]) -> Processed:
    """Model inputs and expansions of several entries, as `Family.images` returns them for all images at once."""
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
    """Concatenate tensors [n, ...], padding smaller ones with zeros, as processors do for missing tiles."""
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
    """Entries with one mark, in memory up to a size limit, and in a folder if one is given."""

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
"""The current cache of this process: the trials of a sweep share entries that don't differ between them."""


class PixelStore:
    """A cache of the processor's image tensors."""

    kind = "pixels"

    def __init__(self, mark: str, config: DataConfig):
        """`mark`: a hash of everything that an entry depends on, except the image."""
        self.budget = config.cache_gb * 1e9
        folder = None
        if config.caches_on_disk:
            folder = Path(config.cache_folder or default_folder()).expanduser() / self.kind / mark
        if (mark, folder) not in STORES:
            STORES.clear()
            STORES[mark, folder] = Store(None if folder is None else CacheFolder(folder))
        self.store = STORES[mark, folder]
        self.computed, self.found, self.seconds = 0, 0, 0.0

    def of(self, shown: Shown, images: Process) -> Processed:
        """Inputs and expansions of the images `shown`."""
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

    def compute(self, processed: Sequence[Processed]) -> list[Entry]:
        """Make entries from the processor's tensors and expansions of each group."""
        return [Entry(*each) for each in processed]

    def report(self) -> str:
        """One line for the log: what the cache cost and saved."""
        each = self.seconds / max(self.computed, 1)
        size = self.store.bytes / 1e6
        return (
            f"image {self.kind}: {self.computed} computed in {self.seconds:.1f} s, {self.found} times reused "
            f"(about {each * self.found:.0f} s saved), {size:.0f} MB in memory"
        )


def _group_key(sources: Sequence[Any], opened: Sequence[Callable[[], Any]]) -> str:
    keys = [_key(source, each) for source, each in zip(sources, opened, strict=True)]
    return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()


def _key(source: Any, opened: Callable[[], Any]) -> str:
    """Equal for equal images: a hash of a file's bytes, else of the opened image, since a function may return a
    different one each time.
    """
    if not isinstance(source, Path | bytes):
        picture = opened()
        return hashlib.sha256(f"{picture.size}{picture.mode}".encode() + picture.tobytes()).hexdigest()
    try:
        return content_key(source)
    except OSError:
        opened()  # reports what is wrong with the file, and which row shows it
        raise


def pixels_mark(processor: Any, fast_jpeg: bool) -> str:
    """A hash of everything that the processor's tensors depend on, except the image."""
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
