"""A PEFT config object from the fields of `adapter`."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from vlmtune.errors import ConfigError, nearest
from vlmtune.packages import without_bitsandbytes

IGNORED = re.compile(r"ignored|no effect|only supported|Setting .+ to (False|None)|does not work")
"""How PEFT warns of a field that it passes over."""


def peft_config(method: str, fields: dict[str, Any]) -> Any:
    """PEFT's config object for `method`, each of the `fields` in the type that it is declared with.

    Raises ConfigError: a method or field that the installed PEFT lacks, a value of another type, one that PEFT refuses,
    or a field that PEFT says it would ignore.
    """
    cls = config_class(method)
    wrong = [f"adapter.{key}: {method} of {_installed()} has no such field" for key in fields if key not in _hints(cls)]
    typed = {key: _typed(cls, key, value, wrong) for key, value in fields.items() if key in _hints(cls)}
    if wrong:
        raise ConfigError(wrong)
    with refusals(method):
        return cls(**typed)


@without_bitsandbytes()
def config_class(method: str) -> Any:
    """PEFT's config class of a method. Raises ConfigError where the installed PEFT has no such method."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"adapter.method={method}: {_installed()} has no such method") from error


def field_names(method: str) -> set[str]:
    """The fields of a method's config class."""
    return {field.name for field in dataclasses.fields(config_class(method))}


def _installed() -> str:
    return f"the installed PEFT ({version('peft')})"


def _typed(cls: type, key: str, value: Any, wrong: list[str]) -> Any:
    """`value` in the type of the field: PEFT takes any, and reads the text `off` as true."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint: Any = _hints(cls)[key] | None
    for group in filter(dataclasses.is_dataclass, typing.get_args(hint)):
        known = {field.name for field in dataclasses.fields(group)}
        unknown = sorted(set(value) - known) if isinstance(value, dict) else []
        wrong += [f"adapter.{key}.{name}: no such key; {nearest(str(name), known)}" for name in unknown]
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(problem["msg"] for problem in error.errors())
        wrong.append(f"adapter.{key}={value}: {', or: '.join(reasons)}")
        return None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@contextmanager
def refusals(method: str) -> Iterator[None]:
    """Turn what PEFT raises, and what it warns that it ignores, into one ConfigError. Other warnings are dropped."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield
        except ConfigError:
            raise
        except (TypeError, ValueError, RuntimeError, ImportError, LookupError, AttributeError) as error:
            raise ConfigError(f"adapter={method}: PEFT refuses it here: {error}") from error
    ignored = {" ".join(str(warning.message).split()) for warning in seen}
    ignored = {text for text in ignored if IGNORED.search(text)}
    if ignored:
        raise ConfigError([f"adapter={method}: PEFT says: {text}" for text in sorted(ignored)])
