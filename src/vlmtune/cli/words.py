"""The arguments of a command line: checked before anything is written, then left in `sys.argv` in Hydra's form."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune.cli import resumed
from vlmtune.commands import typed
from vlmtune.config import compose, paths
from vlmtune.errors import ConfigError, StorageError, UsageError
from vlmtune.launch.world import World

Check = Callable[[list[str], bool, World], None]
"""Gets the overrides and whether -m is set. Raises VlmtuneError for what is wrong, without opening data or model."""


def prepare(command: str, check: Check, world: World) -> None:
    """Check the command line and put it into Hydra's form in `sys.argv`. Raises VlmtuneError with all problems."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("the working folder no longer exists; change into one that does") from None
    words = flags_and_overrides(command)
    if words.hydra_help or words.shell_completion:
        return
    given = resumed.of_sweep(words.overrides) if words.multirun else words.overrides
    usable, problems = compose.normalise(given)
    looks_only = words.help or words.cfg or words.info
    if not looks_only:
        refuse_launcher(command, given, words.multirun, world)
        check(given, words.multirun, world)
    elif problems:
        raise ConfigError(problems)
    flags = [word for word in sys.argv[1:] if word not in words.overrides]
    sys.argv[1:] = [*flags, *usable, *resumed.folder_of_run(given)]


def gather(command: str, key: str) -> None:
    """Put the words in `sys.argv` that are no key=value, and names of existing files, into one list: `key=[a,b]`."""
    words = flags_and_overrides(command).overrides
    plain = [word for word in words if "=" not in word or os.path.exists(word)]
    if plain:
        rest = [word for word in sys.argv[1:] if word not in plain]
        sys.argv[1:] = [*rest, f"{key}=[{','.join(map(paths.quoted, plain))}]"]


def flags_and_overrides(command: str) -> Any:
    """The command line as Hydra's parser reads it. Raises UsageError for flags that don't apply here."""
    from hydra._internal.utils import get_args_parser

    words, unknown = get_args_parser().parse_known_intermixed_args()
    problems = [
        f"{flag}: no such flag ({typed(command)} --hydra-help lists them); keys go without dashes: key=value"
        for flag in unknown
    ]
    if words.config_name or words.config_path or words.config_dir:
        problems.append(
            "--config-name, --config-path, --config-dir: a command has one config; set keys of it: key=value"
        )
    if problems:
        raise UsageError(problems)
    return words


def overrides_given(command: str) -> list[str]:
    """The `key=value` arguments of this process's command line, or of its multirun job."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        return list(HydraConfig.get().overrides.task)
    return list(flags_and_overrides(command).overrides)


def refuse_launcher(command: str, overrides: list[str], multirun: bool, world: World) -> None:
    """Raise ConfigError for what can't work under a launcher, or would merge a sweep into one W&B run."""
    if multirun and not world.is_alone:
        raise ConfigError(
            "-m under a launcher would give each process other parameters. Run the sweep on one process: "
            f"{typed(command)} -m {shlex.join(overrides)}"
        )
    if command != "train" and not world.is_alone:
        raise ConfigError(f"{command} works in one process; start it without a launcher: {typed(command)} ...")
    if multirun and os.environ.get("WANDB_RUN_ID"):
        raise ConfigError(
            "WANDB_RUN_ID: would make one run of all trials of a sweep; unset it (WANDB_RUN_GROUP is theirs)"
        )
