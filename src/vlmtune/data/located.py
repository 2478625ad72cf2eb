"""Image cells -> image sources; nothing is opened here."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlmtune.config.schema import DataConfig
from vlmtune.data.answers import PYTHON_LIST
from vlmtune.data.cells import Number, as_list, is_blank, json_list
from vlmtune.data.images import Source
from vlmtune.data.meanings import PARTS, UnreadKeys
from vlmtune.data.paths import local_path
from vlmtune.errors import DataError

EXAMPLE = "data.image_name={}.jpg, or COCO_train2014_{:012d}.jpg"


class Locator:
    """Locates the images of one file's rows. Relative paths start at `data.image_root`, else at the file's folder."""

    def __init__(self, config: DataConfig, file: str, unread: UnreadKeys):
        own = Path(file).expanduser()
        self.root = Path(config.image_root).expanduser() if config.image_root else own if own.is_dir() else own.parent
        self.separator, self.unread = config.image_separator, unread
        self.name = checked_name(config.image_name)
        self.paths: dict[str, Path] = {}

    def of_cell(self, cell: Any) -> list[tuple[Source, Hashable]]:
        """The images of a cell, each with its key."""
        listed = _list(cell, self.separator)
        if listed is not None:
            return [self.locate(item) for item in listed]
        return [] if is_blank(cell) else [self.locate(cell)]

    def locate(self, cell: Any) -> tuple[Source, Hashable]:
        """One image and its key: equal for equal images."""
        if isinstance(cell, dict) and {"bytes", "path"} & cell.keys():  # as in Hugging Face's data sets
            self.unread.check(cell, frozenset(("bytes", "path")), PARTS, "an image's ")
            path = cell.get("path")
            if not cell.get("bytes") and "://" in str(path):  # in an archive, or on a hub
                return partial(_from_data_set, cell), str(path)
            cell = cell.get("bytes") or path
        if isinstance(cell, str) and cell.startswith("data:image/") and ";base64," in cell[:64]:
            cell = _decoded(cell)
        if isinstance(cell, bytes):
            return cell, hashlib.sha256(cell).hexdigest()
        if isinstance(cell, Image.Image) or callable(cell):
            return cell, id(cell)
        if is_blank(cell):
            raise DataError("not an image: an image in the list is missing")
        if isinstance(cell, Number | int) and not self.name:
            raise DataError(f"not an image: the cell is a number ({cell}); say how files are named: {EXAMPLE}")
        if not isinstance(cell, str | Path | int):
            raise DataError(f"not an image: the cell is {type(cell).__name__}; give a path, bytes or a PIL image")
        text = named(self.name, str(cell)) if self.name else str(cell)
        if text not in self.paths:
            self.paths[text] = Path(os.path.realpath(self.root / os.path.expanduser(local_path(text))))
        return self.paths[text], str(self.paths[text])


def checked_name(pattern: str | None) -> str | None:
    """`data.image_name`, which must have exactly one placeholder. Raises DataError otherwise."""
    if pattern is None:
        return None
    try:
        fits = "12" in pattern.format(12) and pattern.count("{") == pattern.count("}") == 1
    except (ValueError, IndexError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise DataError(f"data.image_name={pattern}: needs exactly one placeholder, as in {EXAMPLE}")
    return pattern


def named(pattern: str, cell: str) -> str:
    """The file name of an image, made from its cell."""
    if ":" not in pattern[pattern.index("{") : pattern.index("}")]:
        return pattern.format(cell)
    if not cell.strip().isdecimal():
        raise DataError(f"not an image: {cell!r:.60} is not a whole number, which data.image_name={pattern} needs")
    return pattern.format(int(cell))


def _from_data_set(cell: dict[str, Any]) -> Image.Image:
    import datasets

    picture: Image.Image = datasets.Image().decode_example(cell)
    return picture


def _list(cell: Any, separator: str | None) -> list[Any] | None:
    """The items of a cell with several images: a list, a JSON list of texts, or texts between separators."""
    cell = as_list(cell)
    if isinstance(cell, list | tuple):
        return list(cell)
    if not isinstance(cell, str):
        return None
    if PYTHON_LIST.fullmatch(cell):
        raise DataError(f'image is a Python list: {cell:.60}; write JSON: ["a.png", "b.png"]')
    found = json_list(cell)
    if found is not None and all(isinstance(item, str) for item in found):
        return found
    if separator is not None and separator in cell:
        return [part.strip() for part in cell.split(separator)]
    return None


def _decoded(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except ValueError as error:
        raise DataError(f"not an image: the data URL is not base64 ({error})") from None
