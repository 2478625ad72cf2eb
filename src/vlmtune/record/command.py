"""The command that starts a run like a given one, from its config."""

from __future__ import annotations

import copy
import functools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.config import compose
from vlmtune.config.paths import quoted
from vlmtune.config.schema import OPEN_GROUPS, Config, plain

NOT_SHOWN = ("resume", "preflight", "model.architecture")
"""Beginnings of keys that don't decide what a run learns."""


def command_of(config: Config) -> str:
    """`python src/train.py` with each key that differs from a run without any. Of absolute paths the last name is left.

    Read back, it is the same config.
    """
    own, usual = plain(config), copy.deepcopy(_usual())
    words = []
    for group in OPEN_GROUPS:
        if own[group]["method"] != usual[group]["method"]:
            words.append(f"{group}=none")
            usual[group] = {
                "method": None,
                "parts": usual[group]["parts"],
                **({"from": None} if group == "adapter" else {}),
            }
    before = dict(_leaves(usual))
    now = dict(_leaves(own))
    gone = [key for key in before if key not in now and not any(f"{n}.".startswith(f"{key}.") for n in now)]
    shown = [key for key in [*now, *gone] if not key.startswith(NOT_SHOWN) and now.get(key) != before.get(key)]
    words += [shlex.quote(f"{key}={in_grammar(now.get(key))}") for key in shown]
    return " ".join(["python src/train.py", *words])


@functools.cache
def _usual() -> dict[str, Any]:
    """The config of a run without any key."""
    return plain(compose.read("train", [])[0])


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def in_grammar(value: Any) -> str:
    """A value in Hydra's grammar; of an absolute path the last name."""
    if isinstance(value, str):
        text = Path(value).name if Path(value).expanduser().is_absolute() else value
        plain_word = all(letter.isalnum() or letter in "_-./" for letter in text) and text[:1].isalpha()
        word = plain_word and text.lower() not in ("null", "true", "false", "nan", "inf")
        return text if word else quoted(text)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(in_grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_grammar(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)
