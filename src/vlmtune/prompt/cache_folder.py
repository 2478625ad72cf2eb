"""Entries of the image cache on disk, shared by runs and machines: what can't be trusted is computed again.

An entry is a safetensors file with a checksum over its content and its place, so that neither a flipped bit nor
another model's or image's entry is used. Where the disk refuses, only the caching on disk ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger("vlmtune")

STALE_SECONDS = 600
"""After which a half-written file is taken for that of a process that was killed."""


@dataclass(frozen=True)
class Entry:
    """What stands for the images that a prompt shows together."""

    inputs: dict[str, Tensor]
    """What the processor made: all of it, or what the language model needs besides features (the grids of mRoPE)."""
    expansions: list[str]
    """The text of each image in the prompt."""
    pooled: list[Tensor] = field(default_factory=list)
    """Features [tokens, hidden] of each image, or of each tile."""
    stacked: bool = True
    """Whether the model hands its features on as one tensor, not as a list."""
    deepstack: list[list[Tensor]] = field(default_factory=list)
    """Per layer that gets features of its own (Qwen3-VL): as `pooled`."""

    @property
    def size(self) -> int:
        """Bytes."""
        features = [*self.pooled, *(t for layer in self.deepstack for t in layer)]
        return sum(t.nbytes for t in [*self.inputs.values(), *features])


class CacheFolder:
    """A folder of entries under one mark, which is the folder's name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writable = True
        self.warned = False
        with contextlib.suppress(OSError):  # another run may clean up too, or nobody may
            for part in folder.glob("*/*.part"):
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()

    def get(self, key: str) -> Entry | None:
        """The entry of an image; None where there is none, or none that can be trusted."""
        try:
            return read_entry(self._path(key))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not self.warned:
                log.warning("%s: can't be used (%s); it and others like it are computed again", self._path(key), error)
            self.warned = True
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry, while the disk takes them."""
        if not self.writable:
            return
        try:
            write_entry(self._path(key), entry)
        except OSError as error:
            self.writable = False
            log.warning("%s: can't be written (%s); from here on nothing is cached on disk", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def write_entry(path: Path, entry: Entry) -> None:
    """A safetensors file, complete or absent, whoever else writes it."""
    tensors = {f"inputs.{key}": value.contiguous() for key, value in entry.inputs.items()}
    tensors |= {f"pooled.{n:04d}": t for n, t in enumerate(entry.pooled)}
    tensors |= {f"deepstack.{n:04d}.{m:04d}": t for n, row in enumerate(entry.deepstack) for m, t in enumerate(row)}
    described = {"expansions": json.dumps(entry.expansions), "stacked": json.dumps(entry.stacked)}
    content = save(tensors, {**described, "checksum": _checksum(path, tensors, described)})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_entry(path: Path) -> Entry:
    """Raises ValueError where the content is not what `write_entry` put into this place."""
    content = path.read_bytes()  # at once: safetensors opens a path twice, and another writer may come between
    tensors = dict(sorted(load(content).items()))
    described = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if described.pop("checksum", None) != _checksum(path, tensors, described):
        raise ValueError("its checksum differs")
    layers: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("deepstack."):
            layers.setdefault(key.split(".")[1], []).append(value)
    return Entry(
        {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")},
        json.loads(described["expansions"]),
        [value for key, value in tensors.items() if key.startswith("pooled.")],
        json.loads(described["stacked"]),
        [layers[layer] for layer in sorted(layers)],
    )


def _checksum(path: Path, tensors: dict[str, Tensor], described: dict[str, str]) -> str:
    """Over the mark and the key of an entry, and all that it holds."""
    digest = hashlib.sha256(json.dumps([path.parts[-3:], sorted(described.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
