"""Entries of the image cache on disk, shared by runs and machines: an entry that can't be trusted is computed again.

An entry is a safetensors file with a checksum over its content and its key, so that neither a damaged entry nor one of
another model or image is used. If the disk fails, only caching on disk stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlmtune.display import own

STALE_SECONDS = 600
"""After this time a partial file counts as left behind by a killed process."""


@dataclass(frozen=True)
class Entry:
    """The cached values for the images that a prompt shows together."""

    inputs: dict[str, Tensor]
    """The processor's output: all of it, or only what the language model needs in addition to features (mRoPE's grids).
    """
    expansions: list[str]
    """The text of each image in the prompt."""
    pooled: list[Tensor] = field(default_factory=list)
    """Features [tokens, hidden] of each image, or of each tile."""
    stacked: bool = True
    """Whether the model passes its features on as one tensor, not as a list."""
    deepstack: list[list[Tensor]] = field(default_factory=list)
    """For each layer that gets its own features (Qwen3-VL): as `pooled`."""

    @property
    def size(self) -> int:
        """Bytes."""
        features = [*self.pooled, *(t for layer in self.deepstack for t in layer)]
        return sum(t.nbytes for t in [*self.inputs.values(), *features])


class CacheFolder:
    """A folder of entries with the same mark, which is the folder's name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writable = True
        self.warned = False
        with contextlib.suppress(OSError):  # another run may clean up at the same time, or the folder may be read-only
            for part in folder.glob("*/*.part"):
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()

    def get(self, key: str) -> Entry | None:
        """The entry of an image; None if there is none, or if it can't be trusted."""
        try:
            return read_entry(self._path(key))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not self.warned:
                own.warning(
                    "%s: can't be used (%s); this and similar entries are computed again", self._path(key), error
                )
            self.warned = True
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry, unless writing has failed before."""
        if not self.writable:
            return
        try:
            write_entry(self._path(key), entry)
        except OSError as error:
            self.writable = False
            own.warning("%s: can't be written (%s); nothing more is cached on disk", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def write_entry(path: Path, entry: Entry) -> None:
    """Write a safetensors file atomically, even if other processes write it too."""
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
    """Read an entry. Raises ValueError if the content is not what `write_entry` wrote under this key."""
    content = path.read_bytes()  # read once: safetensors opens a path twice, and another process may write in between
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
    """The checksum over an entry's mark, key and content."""
    digest = hashlib.sha256(json.dumps([path.parts[-3:], sorted(described.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
