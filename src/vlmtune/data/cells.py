"""A cell's value -> the text that a model sees: the text in the source, or JSON if the source has no text.

Numbers keep their digits, booleans are true and false, objects are JSON, and nothing is converted through floats.
"""

from __future__ import annotations

import datetime
import enum
import functools
import json
import numbers
import os
import re
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class Number(str):
    """A number from a JSON file with its digits as written: neither 1.50 nor 12345678901234567890 survives a float."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Unreadable(str):
    """A value that can't be used; this only matters if it is read. As a text it is the value itself."""

    reason: str = ""

    @classmethod
    def of(cls, value: Any, reason: str) -> Unreadable:
        """`value`, with the reason why it can't be used."""
        found = cls(value)
        found.reason = reason
        return found


# ---------------------------------------------------------------- JSON


def from_json(text: str, **options: Any) -> Any:
    """Read JSON, with numbers as they are written. `options`: those of json.JSONDecoder.

    Raises json.JSONDecodeError, or DataError if it is nested too deeply.
    """
    try:
        return _decoder(**options).decode(text)
    except RecursionError:
        raise DataError("nested too deeply") from None


@functools.lru_cache
def _decoder(**options: Any) -> json.JSONDecoder:
    """Created once, not for each line of a file."""
    return json.JSONDecoder(parse_float=Number, parse_int=Number, parse_constant=_constant, **options)


def _constant(name: str) -> Any:
    """NaN in JSON is how tables write a missing value."""
    return None if name == "NaN" else Number(name)


def to_json(value: Any, default: Callable[[Any], str] | None = None) -> str:
    """A value as one line of JSON, with numbers as they are written. `default` is used in messages about values without
    a text.
    """
    value = as_list(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {to_json(item, default)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_json(item, default) for item in value) + "]"
    if is_missing(value):
        return "null"
    try:
        text = text_of(value, "value")
    except DataError:
        if default is None:
            raise
        return _quoted(default(value))
    plain = isinstance(value, Number | bool | numbers.Number) or _is_truth_type(value)
    return text if plain else _quoted(text)


def _quoted(text: Any) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def json_list(text: str) -> list[Any] | None:
    """The list in a JSON text, or None."""
    try:
        found = from_json(text) if text.lstrip().startswith("[") else None
    except (json.JSONDecodeError, DataError):
        return None
    return found if isinstance(found, list) else None


# ---------------------------------------------------------------- single values


def as_list(cell: Any) -> Any:
    """Arrays, series and tuples as lists; anything else is unchanged."""
    if isinstance(cell, str | bytes) or not hasattr(cell, "tolist") or getattr(cell, "ndim", 0) == 0:
        return cell
    return [as_list(item) for item in cell]


def is_missing(cell: Any) -> bool:
    """None, NaN, NaT and pandas' NA."""
    if cell is None or isinstance(cell, str | list | dict):
        return cell is None
    import pandas as pd

    return bool(pd.api.types.is_scalar(cell)) and bool(pd.isna(cell))


def is_blank(cell: Any) -> bool:
    """Missing, or only white space."""
    return not cell.strip() if isinstance(cell, str) else is_missing(cell)


WRITTEN = (str, numbers.Number, datetime.date, datetime.time, datetime.timedelta, uuid.UUID, os.PathLike)
"""Types whose `str` is the text that a file would contain."""


def text_of(cell: Any, role: str) -> str:
    """A cell as text; empty for a missing one. Raises DataError for a value without a text."""
    if type(cell) is str:
        return cell
    if isinstance(cell, Unreadable):
        raise DataError(f"{role} {cell.reason}")
    cell = as_list(cell)
    if isinstance(cell, enum.Enum):
        return text_of(cell.value, role)
    if isinstance(cell, bytes):
        return _decoded(cell, role)
    if isinstance(cell, dict):
        return to_json(cell)
    if is_missing(cell):
        return ""
    if isinstance(cell, bool) or _is_truth_type(cell):
        return "true" if cell else "false"
    if isinstance(cell, Decimal):
        return format(cell, "f")
    if isinstance(cell, WRITTEN) or type(cell).__name__ in ("datetime64", "timedelta64", "Period"):
        return str(cell)
    raise DataError(f"{role} is {type(cell).__name__}: {cell!s:.60}; a text is needed")


def _is_truth_type(cell: Any) -> bool:
    return isinstance(cell, bool) or type(cell).__name__ in ("bool_", "bool")  # numpy's


def _decoded(cell: bytes, role: str) -> str:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        raise DataError(f"{role} is bytes that are not UTF-8: {cell!r:.60}; a text is needed") from None


def column_values(series: pd.Series) -> list[Any]:
    """The values of a column, without conversion to wider floats."""
    kind = series.dtype
    if kind.name == "category":
        names = column_values(series.cat.categories.to_series())
        return [None if code < 0 else names[code] for code in series.cat.codes]
    if kind.name in ("float16", "float32"):
        return list(series.to_numpy())
    return series.tolist()


# ---------------------------------------------------------------- questions about values


def says_nothing(value: Any) -> bool:
    """Whether a value is missing, empty, or contains only such values, like a row that lacks the key."""
    value = as_list(value)
    if isinstance(value, dict):
        return all(says_nothing(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(says_nothing(item) for item in value)
    return is_blank(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def is_structure(value: Any) -> bool:
    """Whether it is a list or an object, also as JSON in a text."""
    return isinstance(as_list(value), list | tuple | dict) or str(value).lstrip().startswith(("[", "{"))


def is_truth(value: Any) -> bool:
    """Whether it is a boolean, also as a text."""
    return _is_truth_type(value) or (isinstance(value, str) and value.strip().casefold() in ("true", "false"))


def is_image(value: Any) -> bool:
    """Whether it is an image, by type or file extension."""
    if isinstance(value, str):
        return re.search(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$|^data:image/", value.strip(), re.IGNORECASE) is not None
    return isinstance(value, bytes) or hasattr(value, "getpixel") or (isinstance(value, dict) and "bytes" in value)


def is_media(value: Any) -> bool:
    """Whether it is a video or audio, by file extension or content."""
    endings = r"\.(mp4|m4v|avi|mov|mkv|webm|gif|wav|mp3|m4a|flac|ogg|opus)$"
    return re.search(endings, str(value).strip(), re.IGNORECASE) is not None or is_structure(value)


def is_one(value: Any) -> bool:
    """Whether it is the number 1, also as a text or as true, or a list of these."""
    value = as_list(value)
    if isinstance(value, list | tuple):
        return all(map(is_one, value))
    return as_number(value) == 1


def as_number(value: Any) -> float | None:
    """The number that a value or a text stands for, if it is one."""
    if is_truth(value):
        return float(str(value).strip().casefold() == "true")
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
