"""The composed configuration into dataclasses, with every problem of it in one error."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmtune.config import peft_fields, quantization_fields
from vlmtune.config.paths import expand
from vlmtune.config.schema import OPEN_GROUPS, PARTS, Config, nested_schema
from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics import resolve


def strict(composed: DictConfig) -> Config:
    """Turn a composed config into a `Config`.

    Raises ConfigError that lists every unknown key, wrong type, value out of bounds and impossible combination.
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
    """Problems of a saved config by itself: keys that don't exist here, wrong types, values out of bounds."""
    problems: list[str] = []
    raw = OmegaConf.to_container(saved)
    assert isinstance(raw, dict)
    _read(Config, raw, "", problems)
    return problems


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
        problems.append(f"{key}={value!r}: must be of type {spec.type}")
        return None
    rule = spec.metadata
    if "files" in rule and not (value is None or _is_name(value) or _are_names(value)):
        problems.append(f"{key}={value}: must be a file, or a list of files: {key}=[a.csv,b.csv]; quote a number")
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
    """`value` in the form in which OmegaConf takes every text in it as it stands: `${...}` is no reference."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\${", value) if isinstance(value, str) else value


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


def _read_open(group: str, raw: dict[Any, Any], problems: list[str]) -> dict[str, Any]:
    """Check an `adapter` or `quantization` group against the config class of the package that defines the method."""
    values = dict(raw)
    method = values.setdefault("method", None)
    values.setdefault("parts", ["language"])
    if not isinstance(values["parts"], list):
        problems.append(f"{group}.parts={values['parts']}: must be a list, for instance [language]")
    if method is None:
        problems += [
            f"{group}.{key}: there is nothing to set with {group}=none" for key in raw if key not in ("method", "parts")
        ]
        return values
    methods = OPEN_GROUPS[group]()
    if str(method) not in methods:
        problems.append(f"{group}.method={method}: {nearest(str(method), methods)}")
        return values
    allowed = methods[method]
    problems += [
        f"{group}.{key}: {method} has no such field; {_meant(str(key), allowed)}"
        for key in values
        if key not in allowed and key not in ("method", "parts")
    ]
    return values


def _meant(field: str, allowed: list[str]) -> str:
    """The nearest fields, and all others in the order of their class, which puts the main ones first."""
    hint = nearest(field, allowed, most=0)
    return f"{hint} " * hint.startswith("did") + f"choose from: {', '.join(allowed)}"


def is_commit(revision: str | None) -> bool:
    """True for a commit's full hash: a branch or a tag may hold other code tomorrow."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def combinations(config: Config) -> list[str]:
    """Problems of fields that are fine alone but not together."""
    found = []
    trainer, model = config.trainer, config.model
    if model.path is None and model.fresh is None:
        found.append("model.path: missing; give a hub id or a folder, or choose a model by name (model=qwen2vl_7b)")
    if model.trust_remote_code and not Path(str(model.path)).expanduser().is_dir() and not is_commit(model.revision):
        found.append(
            f"model.revision={model.revision}: code of a repository is only run at a pinned commit; give the 40 "
            "characters of one that you have read"
        )
    if not config.task.metrics:
        found.append("task.metrics: is empty; give at least one, for instance task.metrics=[exact_match]")
    try:
        resolve(config.task.metrics)
    except ConfigError as error:
        found += error.problems
    if config.resume and config.adapter["method"] == "adalora":
        found.append("resume: AdaLoRA keeps part of its state to itself, so a resumed run would be another one")
    for key in ("eval_every", "save_every"):
        value = getattr(trainer, key)
        if value not in (None, "epoch") and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            found.append(f"trainer.{key}={value}: must be a number of steps, `epoch` or null")
    for key, names in {
        "model.freeze": model.freeze,
        "trainer.learning_rate_of": trainer.learning_rate_of,
        "adapter.parts": config.adapter["parts"],
        "quantization.parts": config.quantization["parts"],
    }.items():
        found += [f"{key}: {name} is no part; {nearest(str(name), PARTS)}" for name in names if name not in PARTS]
    if config.optimizer.loraplus_lr_ratio != 1 and config.adapter["method"] not in ("lora", "adalora"):
        found.append("optimizer.loraplus_lr_ratio: is for LoRA's B matrices; use adapter=lora or one of its variants")
    if config.uses_adapter and model.save_layout == "original":
        found.append("model.save_layout=original: is for whole models (adapter=none); an adapter has no such layout")
    data = config.data
    for role, name in vars(data.columns).items():
        if name in data.ignore:
            found.append(f"data.ignore: {name} is what data.columns.{role} reads; leave it out of one of them")
    if (data.streaming or data.subset) and data._target_ != "vlmtune.data.sources.hub.load":
        found.append("data.streaming, data.subset: are for data=hub")
    if data.streaming and data.on_duplicate != "keep":
        found.append("data.on_duplicate: repeated rows of a stream aren't found; leave it out")
    if data.header is not None and data._target_ != "vlmtune.data.table.read_files":
        found.append("data.header: is for CSV and TSV files, with data=csv")
    if data.header is not None and (not data.header or len(set(data.header)) < len(data.header)):
        found.append(
            f"data.header={data.header}: must name each column once, for instance [image_path,question,answer]"
        )
    if data.streaming and trainer.share_prefix == "on":
        found.append("trainer.share_prefix=on: rows of a stream can't be grouped by their images; use auto")
    if data.streaming and "epoch" in (trainer.save_every, trainer.eval_every if data.validation else None):
        found.append("data.streaming: a stream has no epochs; set trainer.eval_every and save_every to steps or null")
    if data.streaming and trainer.max_steps is None:
        found.append("data.streaming: a stream has no length; set trainer.max_steps")
    if data.streaming and data.validation_fraction:
        found.append("data.validation_fraction: nothing can be held out of a stream; set data.validation")
    if data.streaming and (data.validation or data.test) and data.max_eval_rows is None:
        found.append("data.max_eval_rows: missing; with data.streaming only so many rows are read for evaluation")
    if config.uses_adapter and model.freeze:
        found.append(
            f"model.freeze={model.freeze}: under an adapter the whole base model is frozen already; "
            "drop model.freeze, or use adapter=none"
        )
    if config.is_quantized and not config.uses_adapter:
        found.append(
            "quantization: quantized weights can't be trained themselves; add an adapter, for instance adapter=lora"
        )
    if config.is_quantized:
        found += quantization_fields.problems(config.quantization)
    if config.uses_adapter:
        bits = {"bitsandbytes_4bit": 4, None: None}.get(config.quantization["method"], 8)
        found += peft_fields.problems(config.adapter, bits=bits)
    if model.image.min_tokens and model.image.max_tokens and model.image.min_tokens > model.image.max_tokens:
        found.append(
            f"model.image.min_tokens={model.image.min_tokens}: above model.image.max_tokens={model.image.max_tokens}"
        )
    if trainer.early_stopping_patience and not (trainer.best_metric and trainer.eval_every):
        found.append("trainer.early_stopping_patience: also needs trainer.best_metric and trainer.eval_every")
    if trainer.best_metric:
        name = trainer.best_metric.removeprefix("eval/")
        metrics = ["loss", *config.task.metrics]
        if name not in metrics:
            found.append(f"trainer.best_metric={trainer.best_metric}: {nearest(name, [f'eval/{m}' for m in metrics])}")
        if not trainer.eval_every:
            found.append("trainer.best_metric: also needs trainer.eval_every, or there is nothing to choose from")
    if trainer.precision == "fp16" and model.dtype == "bf16":
        found.append("trainer.precision=fp16: does not go with model.dtype=bf16; use precision=bf16 or dtype=fp16")
    return found
