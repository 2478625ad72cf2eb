"""Paths on a command line, as a shell user types them: `~`, spaces, `=`, commas and brackets are part of the name."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.errors import ConfigError, StorageError

KEYS = (
    "data.train",
    "data.validation",
    "data.test",
    "data.image_root",
    "data.image_name",
    "data.cache_folder",
    "model.path",
    "adapter.from",
    "resume",
    "run",
    "runs",
    "output",
    "gguf",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
QUOTES = " '\""


def literal(word: str, parser: Any) -> str:
    """The override `word`, with its value in quotes if it is a path that Hydra's grammar would misread.

    Commas separate paths, as in a list or a sweep, unless a file with exactly that name exists.
    """
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    if key.lstrip("+") not in KEYS or not equals:
        return word
    if os.path.exists(os.path.expanduser(value)):
        return f"{key}={quoted(home(value))}"
    try:
        override = parser.parse_override(word)
    except HydraException:
        return word if "${" in value else f"{key}={_separated(value)}"
    typed = None if override.is_sweep_override() else override.value()
    return f"{key}={quoted(home(typed))}" if isinstance(typed, str) and typed.startswith("~") else word


def _separated(value: str) -> str:
    """A path, several paths separated by commas, or one per key of a mapping; each in quotes."""
    if re.match(r"{\s*\w+\s*: ", value) and value.endswith("}"):  # one for each split
        pairs = (pair.partition(":") for pair in value[1:-1].split(","))
        return "{" + ",".join(f"{name}:{quoted(home(path.strip(QUOTES)))}" for name, _, path in pairs) + "}"
    opening, closing = ("[", "]") if value.startswith("[") and value.endswith("]") else ("", "")
    names = value.removeprefix(opening).removesuffix(closing).split(",")
    return opening + ",".join(quoted(home(name.strip() if len(names) > 1 else name)) for name in names) + closing


def home(value: str) -> str:
    """`value` with a leading `~` expanded. Raises ConfigError for an unknown user."""
    expanded = os.path.expanduser(value)
    if not expanded.startswith("~"):
        return expanded
    if os.path.exists(value):  # a file whose name begins with ~
        return os.path.abspath(value)
    raise ConfigError(f"{value}: there is no user {value[1:].split('/')[0]!r} and no such file")


def quoted(value: str) -> str:
    """A text quoted for Hydra's grammar, so that it reads back unchanged."""
    end = len(value) - len(value.rstrip("\\"))  # a backslash is doubled only before a quote
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', value) + "\\" * end + '"'


def shown(key: str, value: str) -> str:
    """How to write `key=value` in a shell so that the value is one text."""
    value = value[1:-1].replace('","', ",") if value.startswith('"') else value
    return shlex.quote(f"{key}={quoted(value)}")


def expand(raw: Any, key: str = "") -> Any:
    """A composed configuration with `~` expanded in all paths, also inside lists and mappings."""
    if isinstance(raw, dict):
        return {name: expand(value, key if key in KEYS else f"{key}.{name}".lstrip(".")) for name, value in raw.items()}
    if isinstance(raw, list):
        return [expand(value, key) for value in raw]
    return home(raw) if isinstance(raw, str) and key in KEYS else raw


def check_writable(folder: Path) -> None:
    """Raise StorageError if `folder` could not be created or written to; nothing is written yet."""
    folder = folder.absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir():
        raise StorageError(f"{folder}: can't be created because {existing} is a file; choose another hydra.run.dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder}: can't be created because {existing} is not writable; choose another hydra.run.dir"
        )


def files_of(value: str | Sequence[str] | None) -> list[str]:
    """The files in a value such as `data.train`: none, one or several."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
