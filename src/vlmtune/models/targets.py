"""Which modules an adapter takes: PEFT's own matching of the user's fields, narrowed to `adapter.parts`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from vlmtune.errors import ConfigError, nearest
from vlmtune.models.parts import Parts, modules_in

log = logging.getLogger("vlmtune")

ALL_LINEAR = "all-linear"
NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters")
"""Fields that hold names of modules or parameters."""
PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern", "block_size_pattern")
"""Fields that hold values for some of the targets."""


def names_as_lists(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields`, where one name given without brackets is a list of it: `q_proj` means `[q_proj]`.

    PEFT reads a text as a regular expression of full names, or letter by letter, and then matches nothing.
    """

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and value.lower() != ALL_LINEAR and bool(re.fullmatch(r"[\w.]+", value))

    return {key: [value] if key in NAMES and is_name(value) else value for key, value in fields.items()}


def narrow(peft_config: Any, model: nn.Module, parts: Parts, scope: list[str]) -> None:
    """Replace what `peft_config` targets by the full names of what PEFT would take of it inside the parts `scope`.

    Raises ConfigError where a name, a layer or a pattern takes nothing there.
    """
    problems = unmatched(peft_config, model, parts, scope)
    if problems:
        raise ConfigError(problems)
    if getattr(peft_config, "target_parameters", None):
        wanted = peft_config.target_parameters
        named = [name for name, _ in model.named_parameters() if parts.of(name) in scope]
        peft_config.target_parameters = [name for name in named if ends_with_one(name, wanted)]
    if getattr(peft_config, "target_modules", None) is None:
        return  # parameters alone
    found = [name for name in taken(peft_config, model) if parts.of(name) in scope]
    if getattr(peft_config, "feedforward_modules", None):
        from peft.tuners.ia3 import IA3Model

        is_feedforward = IA3Model._check_target_module_feedforward
        peft_config.feedforward_modules = {name for name in found if is_feedforward(peft_config, name)}
    peft_config.target_modules = set(found)
    without = [part for part in scope if part not in {parts.of(name) for name in found}]
    if without:
        log.warning("adapter.parts: adapter.target_modules matches nothing in %s", ", ".join(without))
    for key in ("layers_to_transform", "layers_pattern"):  # applied: PEFT refuses them beside full names
        if getattr(peft_config, key, None) is not None:
            setattr(peft_config, key, None)


def taken(peft_config: Any, model: nn.Module) -> list[str]:
    """Full names of the modules of the whole model that plain PEFT would put this adapter on."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    _maybe_include_all_linear_layers(peft_config, model)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(peft_config, name)]


def matches(pattern: str | Iterable[str], name: str) -> bool:
    """True where PEFT's `pattern` (a regular expression of full names, or a list of endings) means the module."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return ends_with_one(name, pattern)


def ends_with_one(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def unmatched(peft_config: Any, model: nn.Module, parts: Parts, scope: list[str]) -> list[str]:
    """Problems of names, layers and patterns that would have no effect; plain PEFT passes over most of them."""
    problems = _names(peft_config, model, parts, scope)
    if problems or getattr(peft_config, "target_modules", None) is None:
        return problems
    where = "+".join(scope)
    if not peft_config.target_modules and not getattr(peft_config, "target_parameters", None):
        return ["adapter.target_modules: is empty; give all-linear, or names: [q_proj,v_proj]"]
    if getattr(peft_config, "ensure_weight_tying", False) and parts.of(parts.head) != "language":
        problems.append("adapter.ensure_weight_tying: input and output embedding of this model are not tied")
    problems += _layers(peft_config, model, parts, scope)
    chosen = [name for name in taken(peft_config, model) if parts.of(name) in scope]
    if peft_config.target_modules and not chosen and not problems:
        linear = {n.rsplit(".", 1)[-1] for n, m in modules_in(model, parts, scope) if isinstance(m, nn.Linear)}
        problems.append(
            f"adapter.target_modules: nothing in {where} is left for an adapter, after exclude_modules, "
            f"modules_to_save and layers_to_transform; its linear layers are {', '.join(sorted(linear))}"
        )
    for key in PATTERNS:
        for pattern in getattr(peft_config, key, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in chosen):
                problems.append(f"adapter.{key}: {pattern} is not a target in {where}")
    return problems


def _names(peft_config: Any, model: nn.Module, parts: Parts, scope: list[str]) -> list[str]:
    """Problems of the fields that hold names. What is excluded, or trained beside the adapter, may be in any part."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    everywhere = sorted({*parts.prefixes.values()})
    problems = []
    for key in NAMES:
        names = parameters if key == "target_parameters" else modules
        places = everywhere if key in ("exclude_modules", "modules_to_save") else scope
        problems += _nowhere(key, getattr(peft_config, key, None), names, parts, places)
    return problems


def _nowhere(key: str, wanted: Any, names: list[str], parts: Parts, scope: list[str]) -> list[str]:
    """Problems of the names (or the regular expression) in `wanted` that mean nothing in `scope`."""
    if not wanted or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):
        return []
    problems = []
    inside = [name for name in names if parts.of(name) in scope]
    for pattern in [wanted] if isinstance(wanted, str) else sorted(wanted):
        means = pattern if isinstance(wanted, str) else [pattern]
        try:
            hits = [name for name in names if matches(means, name)]
        except re.error as error:
            problems.append(f"adapter.{key}={pattern}: is not a regular expression: {error}")
            continue
        if not any(parts.of(name) in scope for name in hits):
            problems.append(f"adapter.{key}: {pattern} {_where(hits, parts, scope, pattern, inside)}")
    return problems


def _where(hits: list[str], parts: Parts, scope: list[str], pattern: str, inside: list[str]) -> str:
    if hits:
        others = sorted({parts.of(name) for name in hits})
        return f"is in {', '.join(others)} only; add {others[0]} to adapter.parts={scope}".replace("'", "")
    if "," in pattern:
        return f"is one name; write a list in brackets: [{','.join(word.strip() for word in pattern.split(','))}]"
    words = pattern.count(".") + 1 if re.fullmatch(r"[\w.]+", pattern) else 1
    endings = {".".join(name.split(".")[-words:]) for name in inside}
    return f"matches nothing in {'+'.join(scope)}; {nearest(pattern, {e for e in endings if not e.isdigit()})}"


def _layers(peft_config: Any, model: nn.Module, parts: Parts, scope: list[str]) -> list[str]:
    """Problems of layer numbers under which there is no target."""
    wanted = getattr(peft_config, "layers_to_transform", None)
    problems = []
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        peft_config.layers_to_transform = [layer]
        if not [name for name in taken(peft_config, model) if parts.of(name) in scope]:
            problems.append(f"adapter.layers_to_transform: no target in {'+'.join(scope)} is in a layer {layer}")
    if wanted is not None:
        peft_config.layers_to_transform = wanted
    return problems
