"""Hashes that identify rows, images and base models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.records import Record
from vlmtune.errors import DataError


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of all rows' texts and image names."""
    digest, seen = hashlib.blake2b(digest_size=12), dict[Hashable, int]()
    for record in records:
        images = [image.name for image in record.images if isinstance(image, Path)]  # the folder may move
        turns = repr(record.turns).replace(
            ", trained=True", ""
        )  # older versions did not have it, and their runs must still resume
        group = seen.setdefault(record.group, len(seen))
        digest.update(f"({turns}, {record.system!r}, {images!r}, {group})".encode())
    return digest.hexdigest()


def image_fingerprint(records: Sequence[Record]) -> str:
    """A hash of the content of all rows' images, in order.

    For a file it covers the size and the first, middle and last 16 KiB: headers, and small images in full. Images
    made by a function only count by number. Raises DataError if a file can't be read.
    """
    digest, seen = hashlib.blake2b(digest_size=12), set[Path]()
    for record in records:
        for image in record.images:
            if not isinstance(image, Path):
                digest.update(content(image))
            elif image not in seen:
                seen.add(image)
                digest.update(sampled(image))
    return digest.hexdigest()


def model_files(path: str, commit: str | None) -> str:
    """What identifies a base model: for a folder a hash of its weights and config, else its name and commit.

    `commit`: what the hub resolved the revision to.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{commit}"
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(file.name.encode() + sampled(file))
    return digest.hexdigest()


BLOCK = 16384


def sampled(file: Path) -> bytes:
    """A hash of a file's size and of its first, middle and last 16 KiB."""
    try:
        with file.open("rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)}):
                handle.seek(start)
                digest.update(handle.read(BLOCK))
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from error
    return digest.digest()


def content(image: Any) -> bytes:
    """A hash of an image in memory, 16 bytes: of its file's bytes, or of its pixels; one text for all functions."""
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if not hasattr(image, "tobytes"):
        return b"made by a function"
    return hashlib.blake2b(f"{image.size}{image.mode}".encode() + image.tobytes(), digest_size=16).digest()
