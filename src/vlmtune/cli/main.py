"""The entry points from a shell: the command `vlmtune`, `python -m vlmtune`, and the scripts in `src/`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from vlmtune.cli import chat, compare, evaluate, merge, plan, predict, sweeps, train
from vlmtune.cli.ending import guard, leave, say
from vlmtune.cli.words import gather, overrides_given, prepare
from vlmtune.commands import import_path, typed
from vlmtune.config import compose
from vlmtune.config.schema import home
from vlmtune.errors import ConfigError, UsageError, nearest
from vlmtune.launch import ranks
from vlmtune.launch.world import World
from vlmtune.trials import submitted

COMMANDS: dict[str, Any] = {
    "plan": plan,
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "compare": compare,
    "merge": merge,
    "chat": chat,
}
"""Each module defines `check(overrides, multirun, world)` and `job(composed, world) -> exit code`."""


def main() -> None:
    """`vlmtune COMMAND key=value ...`: take the command out of `sys.argv` and run it."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("--help", "-h"):
        say(overview())
    elif first == "--version":
        say(metadata.version("vlmtune"))
    elif first in COMMANDS:
        del sys.argv[1]
        run(first)
    else:
        leave(guard(lambda: _refuse(first)))


def overview() -> str:
    """The list of commands, each with one line of help."""
    width = max(len(typed(name)) for name in COMMANDS)
    lines = [f"  {typed(name):{width}}  {(module.__doc__ or '').strip()}" for name, module in COMMANDS.items()]
    return "\n".join(["Usage: COMMAND key=value ...; COMMAND --help lists its keys. Commands:", "", *lines])


def _refuse(first: str) -> int:
    """Raise UsageError for a first word that is not a command."""
    if first.startswith("-") or "=" in first:
        raise UsageError(f"{first}: the command comes first, for instance: {typed('train')} {first}")
    raise UsageError(f"{first}: no such command; {nearest(first, COMMANDS)}")


def run(command: str) -> None:
    """Run the Hydra app `conf/<command>.yaml` on the rest of `sys.argv`, once or over a sweep, and end the process."""
    leave(guard(lambda: _run(command, World.from_environment())))


def _run(command: str, world: World) -> int:
    if not world.is_main:
        return guard(lambda: _join(command, world), quiet=True)
    if command == "compare":
        gather(command, "runs")
    prepare(command, COMMANDS[command].check, world)
    job = sweeps.Job(COMMANDS[command].job, world)
    with sweeps.Elsewhere.finishing:
        with_hydra(command, job)
    return job.code()


def _join(command: str, world: World) -> int:
    """Take part in the run whose folder the first rank makes, and which tells what goes wrong."""
    with ranks.reporting(world):
        prepare(command, COMMANDS[command].check, world)
        return int(COMMANDS[command].job(compose.compose(command, overrides_given(command)), world))


def with_hydra(command: str, job: Callable[[Any], None]) -> None:
    """Let Hydra run `job`, once or over a sweep. Raises ConfigError, and what Hydra's own work raises."""
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # or it would answer a folder that can't be made with a traceback
    os.environ["PYTHONPATH"] = import_path()  # of a launcher's jobs
    try:
        with submitted.of_submitit():
            entry = hydra.main(version_base=compose.VERSION_BASE, config_path=str(home() / "conf"), config_name=command)
            entry(job)()
    except HydraException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
