"""Reads the composed configuration into dataclasses, and reports all of its problems in one error."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmtune.config import fields as known_fields
from vlmtune.config.paths import expand
from vlmtune.config.schema import OPEN_GROUPS, AdapterConfig, Config, MethodConfig, nested_schema
from vlmtune.config.together import combinations
from vlmtune.errors import ConfigError, nearest


def strict(composed: DictConfig) -> Config:
    """Turn a composed config into a `Config`.

    Raises ConfigError with every unknown key, wrong type, value out of bounds and impossible combination.
    """
    problems: list[str] = []
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("sweeps", "hydra")])
    try:
        raw = OmegaConf.to_container(ours, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    config: Config = _read(Config, expand(raw), "", problems)
    if not problems:
        problems = combinations(config)
    if problems:
        raise ConfigError(problems)
    return config


def unreadable(saved: DictConfig) -> list[str]:
    """Problems of a saved config: unknown keys, wrong types, values out of bounds."""
    problems: list[str] = []
    raw = OmegaConf.to_container(saved)
    assert isinstance(raw, dict)
    _read(Config, raw, "", problems)
    return problems


def read(schema: type, raw: dict[Any, Any], prefix: str = "") -> Any:
    """Values of a command's own keys, which begin with `prefix`, as the dataclass `schema`. Raises ConfigError with all
    problems.
    """
    problems: list[str] = []
    found = _read(schema, raw, prefix, problems)
    if problems:
        raise ConfigError(problems)
    return found


def _read(schema: type, raw: dict[Any, Any], prefix: str, problems: list[str]) -> Any:
    """Build the dataclass `schema` from `raw`, appending to `problems` instead of raising."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    problems += [f"{prefix}{key}: no such key; {nearest(str(key), fields)}" for key in raw if key not in fields]
    values = {}
    for name, spec in fields.items():
        key = f"{prefix}{name}"
        if name in OPEN_GROUPS and schema is Config:
            values[name] = _read_open(name, raw.get(name) or {}, problems)
        elif nested := nested_schema(spec):
            group = raw.get(name, {})
            if not isinstance(group, dict):
                problems.append(f"{key}={group}: is a group of keys; set one of {', '.join(nested.__annotations__)}")
                group = {}
            values[name] = _read(nested, group, f"{key}.", problems)
        elif name in raw:
            values[name] = _value(schema, spec, key, raw[name], problems)
    return schema(**values)


def _value(schema: type, spec: dataclasses.Field[Any], key: str, value: Any, problems: list[str]) -> Any:
    """Convert one value to its field's type and check its bounds."""
    single = dataclasses.make_dataclass("Single", [("value", _annotations(schema)[spec.name], MISSING)])
    try:
        value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(single), {"value": literal(value)})).value  # type: ignore[union-attr]
    except OmegaConfBaseException:
        problems.append(f"{key}={_typed(value)}: must be of type {spec.type}")
        return None
    rule = spec.metadata
    if "files" in rule and not (value is None or _is_name(value) or _are_names(value)):
        problems.append(
            f"{key}={value}: must be a file, or a list of files: {key}=[a.csv,b.csv]; a number needs quotes"
        )
    if "per_split" in rule and not (value is None or _is_name(value) or _are_roots(value)):
        problems.append(f"{key}={value}: must be a folder, or one per split: {key}={{train: A, test: B}}")
    if "choices" in rule and value not in rule["choices"]:
        problems.append(f"{key}={value}: {nearest(str(value), rule['choices'])}")
    if "least" in rule and value is not None and not (rule["least"] <= value <= rule["most"] and value > rule["above"]):
        low = f"above {rule['above']:g}" if rule["above"] > -math.inf else f"at least {rule['least']:g}"
        high = f" and at most {rule['most']:g}" if rule["most"] < math.inf else ""
        problems.append(f"{key}={value}: must be {low}{high}")
    return value


def literal(value: Any) -> Any:
    """`value` escaped for OmegaConf, so that `${...}` in a text is not an interpolation."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\${", value) if isinstance(value, str) else value


def _typed(value: Any) -> str:
    """`value` as a user types it: null, true, false; others as Python shows them."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_name, value))


def _are_roots(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"train", "validation", "test"}
        and all(map(_is_name, value.values()))
    )


@functools.cache
def _annotations(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _read_open(group: str, raw: dict[Any, Any], problems: list[str]) -> MethodConfig:
    """Check an `adapter` or `quantization` group against the config class that defines its method."""
    fields = {str(key): value for key, value in raw.items() if key not in ("method", "parts")}
    source = fields.pop("from", None) if group == "adapter" else None
    if not (source is None or _is_name(source)):
        problems.append(f"adapter.from={source}: must be a folder")
    method, parts = raw.get("method"), raw.get("parts", ["language"])
    if not isinstance(parts, list):
        problems.append(f"{group}.parts={parts}: must be a list, for instance [language]")
    if method is None:
        useless = [*fields] if source is None else [*fields, "from"]
        problems += [f"{group}.{key}: has no effect with {group}=none" for key in useless]
        return AdapterConfig(None, parts) if group == "adapter" else MethodConfig(None, parts)
    methods = known_fields.methods(group, str(method), fields)
    if str(method) not in methods:
        problems.append(f"{group}.method={method}: {nearest(str(method), methods)}")
    else:
        allowed = methods[str(method)]
        wrong = [key for key in fields if key not in allowed]
        problems += [f"{group}.{key}: {method} has no such field; {_meant(key, allowed)}" for key in wrong]
    if group == "adapter":
        return AdapterConfig(str(method), parts, fields, source)
    return MethodConfig(str(method), parts, fields)


def _meant(field: str, allowed: list[str]) -> str:
    """The nearest fields, or all fields in the order of their class, which starts with the main ones."""
    hint = nearest(field, allowed, most=0)
    return f"{hint} " * hint.startswith("did") + f"choose from: {', '.join(allowed)}"
