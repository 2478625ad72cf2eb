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
    has_agent: bool = False
    """Whether that store is the launcher's: it is there before the processes, and after them."""
    attempt: int = 0
    """How often the launcher has started the processes again."""
    left_alone: bool = False
    """Whether `accelerate launch` was asked for several processes and started this one only: it then names a store that
    nobody opens (accelerate 1.15, `prepare_simple_launcher_cmd_env`).
    """

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun and `accelerate launch` set.

        Raises ConfigError for what is not a number, or can't be, and for several tasks of a scheduler without a
        launcher.
        """
        scheduler.check_tasks()
        rank, processes = _number("RANK"), _number("WORLD_SIZE") or 1
        if (rank is None and processes > 1) or (rank or 0) >= processes:
            raise ConfigError(
                f"RANK={rank}, WORLD_SIZE={processes}: no launcher sets them so, and they may be another job's. Unset "
                "both to run one process; several: backend=accelerate backend.num_processes=N, or torchrun "
                "--nproc_per_node N"
            )
        return cls(
            rank=rank or 0,
            processes=processes,
            processes_here=_number("LOCAL_WORLD_SIZE") or 1,
            address=os.environ.get("MASTER_ADDR"),
            port=_number("MASTER_PORT"),
            has_agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number("TORCHELASTIC_RESTART_COUNT") or 0,
            left_alone=rank is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys(),
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
