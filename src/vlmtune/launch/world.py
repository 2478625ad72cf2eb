"""The processes of a run, as the launcher told this one: read from the environment once, at the entry."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vlmtune.errors import ConfigError
from vlmtune.launch import scheduler


@dataclass(frozen=True)
class World:
    """Where this process stands among those of its run. Without a launcher it is the only one."""

    rank: int = 0
    """Of this process, from 0, over all machines."""
    processes: int = 1
    """How many the launcher started, over all machines."""
    processes_here: int = 1
    """How many of them are on this machine."""
    address: str | None = None
    """Host of the store by which the processes found each other; None without a launcher."""
    port: int | None = None

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun and `accelerate launch` set.

        Raises ConfigError for what is not a number, and for several tasks of a scheduler without a launcher.
        """
        scheduler.check_tasks()
        return cls(
            rank=_number("RANK") or 0,
            processes=_number("WORLD_SIZE") or 1,
            processes_here=_number("LOCAL_WORLD_SIZE") or 1,
            address=os.environ.get("MASTER_ADDR"),
            port=_number("MASTER_PORT"),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether the run has no other process."""
        return self.processes == 1


ALONE = World()
"""A process without a launcher."""


def _number(name: str) -> int | None:
    """The number in an environment variable; None where it is unset or empty."""
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise ConfigError(f"{name}={value}: must be a number, as torchrun sets it; unset it to run one process")
    return int(value)
