"""The fields of PEFT's and transformers' config classes, without importing those packages, which takes seconds.

`installed` wrote `known_fields.json` from the versions named in it. If another version is installed, a method or field
that the table lacks is looked up in the classes themselves. A field that the installed version lacks is refused when a
run builds its class, before a model loads.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune.errors import ConfigError

Methods = dict[str, list[str]]
TABLE = Path(__file__).with_name("known_fields.json")


@functools.cache
def table() -> dict[str, Any]:
    """`known_fields.json`."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def known(group: str) -> Methods:
    """The methods of `adapter`, `quantization` or `attention` with their fields, from the table."""
    methods: Methods = table()[group]["methods"]
    return methods


def methods(group: str, method: str, fields: Iterable[str]) -> Methods:
    """The methods of a group with their fields: from the table, or from the installed package if the table was written
    from another version and lacks `method` or one of `fields`.
    """
    known_ones, made_from = known(group), table()[group]
    if method in known_ones and set(fields) <= set(known_ones[method]):
        return known_ones
    if version(made_from["package"]) == made_from["version"]:
        return known_ones
    installed_ones: Methods = installed()[group]["methods"]
    return installed_ones


@functools.cache
def installed() -> dict[str, Any]:
    """The table for the installed versions, made in a separate process: PEFT and transformers take seconds to import,
    and may initialize a device before this rank has chosen its own.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "vlmtune.config.installed"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), "no reason given")
        keys = "adapter, quantization, model.attention"
        raise ConfigError(f"{keys}: the installed PEFT and transformers can't be imported: {reason}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return found
