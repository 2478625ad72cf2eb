"""Values of Arrow's typed columns (Parquet, Hugging Face's `datasets`) as their sources wrote them.

A class label becomes the class's name, a float32 has the digits of a float32, an integer in a column with nulls stays
an integer. The conversion functions are picklable, since the loader's worker processes also read rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlmtune.data.cells import Unreadable

if TYPE_CHECKING:
    import pyarrow

Converter = Callable[[Any], Any]


def values(table: pyarrow.Table) -> dict[str, list[Any]]:
    """The values of a Parquet file's columns. Class names come from the metadata that `datasets` writes."""
    if b'"ClassLabel"' in (table.schema.metadata or {}).get(b"huggingface", b""):
        import datasets

        converters = {name: of_feature(it) for name, it in datasets.Features.from_arrow_schema(table.schema).items()}
    else:
        converters = {field.name: of_arrow(field.type) for field in table.schema}
    found = {name: table.column(name).to_pylist() for name in table.column_names}
    return {name: list(map(converters[name] or _same, cells)) for name, cells in found.items()}


def _same(value: Any) -> Any:
    return value


def of_arrow(kind: pyarrow.DataType) -> Converter | None:
    """The function that restores a value of Arrow's type `kind` as written; None if no conversion is needed."""
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        return single(str(kind))
    if types.is_struct(kind):
        return each_field({field.name: convert for field in kind if (convert := of_arrow(field.type))})
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return each_item(of_arrow(kind.value_type))
    return of_arrow(kind.value_type) if types.is_dictionary(kind) else None


def of_feature(feature: Any) -> Converter | None:
    """The same for a feature of `datasets`."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return label_names(feature.names)
    if isinstance(feature, datasets.Value):
        return single(feature.dtype) if feature.dtype in ("float32", "float16") else None
    if isinstance(feature, dict):
        return each_field({name: convert for name, inner in feature.items() if (convert := of_feature(inner))})
    inner = getattr(feature, "feature", None)  # list types of `datasets`
    return each_item(of_feature(inner)) if inner is not None else None


def label_names(names: Sequence[str]) -> Converter:
    """The name of a class by its number; a number without a name is a fault."""
    return partial(_label_name, tuple(names))


def _label_name(names: Sequence[str], number: Any) -> Any:
    if number is None or isinstance(number, str):
        return number
    if not 0 <= number < len(names):
        return Unreadable.of(number, f"is class {number}, and the {len(names)} classes are {', '.join(names):.60}")
    return names[number]


def single(kind: str) -> Converter:
    """32-bit or 16-bit floats with their own digits, which Python's floats don't keep."""
    return partial(_single, "float16" if kind in ("float16", "halffloat") else "float32")


def _single(kind: str, value: Any) -> Any:
    import numpy as np

    return None if value is None else np.dtype(kind).type(value)


def each_item(convert: Converter | None) -> Converter | None:
    """`convert` for lists."""
    return partial(_each_item, convert) if convert else None


def _each_item(convert: Converter, value: Any) -> Any:
    return None if value is None else [convert(item) for item in value]


def each_field(converters: dict[str, Converter]) -> Converter | None:
    """`converters` for objects, by field."""
    return partial(_each_field, converters) if converters else None


def _each_field(converters: dict[str, Converter], value: Any) -> Any:
    if value is None:
        return None
    return {key: converters.get(key, _same)(item) for key, item in value.items()}
