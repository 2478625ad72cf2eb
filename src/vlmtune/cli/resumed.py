"""What `resume=FOLDER` means on a command line: to go on in the folder of a run, or of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.config import compose, paths, sweep_file
from vlmtune.config.schema import AUTO
from vlmtune.errors import ConfigError

SETTINGS = ("hydra.launcher.", "hydra.sweeper.n_trials")
"""What may be another when a sweep goes on."""


def folder_of_run(overrides: Sequence[str]) -> list[str]:
    """The Hydra override that makes a resumed run continue in its own folder."""
    folder = _folder(overrides)
    return [f"hydra.run.dir={paths.quoted(folder)}", "hydra.output_subdir=null"] if folder else []


def of_sweep(overrides: list[str]) -> list[str]:
    """The overrides that a resumed sweep was started with, for its folder; any others as they are.

    Raises CheckpointError where the folder is neither a run nor a sweep, and ConfigError for what can't be set.
    """
    named = _folder(overrides)
    if named is None or (Path(named).expanduser() / "config.yaml").is_file():
        return overrides
    folder = Path(named).expanduser()
    given = [each for each in compose.parse(overrides) if each.key_or_group != "resume"]
    problems = [
        f"{each.input_line}: a sweep goes on as it was started; only {SETTINGS[0]}* and {SETTINGS[1]} can be set"
        for each in given
        if not each.key_or_group.startswith(SETTINGS)
    ]
    before = sweep_file.read(folder)["overrides"]
    if problems:
        raise ConfigError(problems)
    kept = [text for text in before if text.partition("=")[0] not in {each.key_or_group for each in given}]
    place = f"hydra.sweep.dir={paths.quoted(str(folder))}"
    return [*kept, *(each.input_line for each in given), f"resume={AUTO}", place]


def without(overrides: Sequence[str]) -> list[str]:
    """The overrides without `resume=auto`, which says how to begin and not what."""
    plain = [text.lstrip("+") for text in overrides]
    return [text for text in plain if text != f"resume={AUTO}"]


def _folder(overrides: Sequence[str]) -> str | None:
    """The folder that `resume` names."""
    given: list[Any] = [o for o in compose.parse(overrides) if o.key_or_group == "resume" and not o.is_sweep_override()]
    found = [override.value() for override in given if override.value() not in (AUTO, None)]
    return str(found[-1]) if found else None
