"""The scheduler's job that this process is part of: one of SLURM, or one that submitit runs on this machine."""

from __future__ import annotations

import os

from vlmtune.errors import ConfigError


def job() -> str | None:
    """The job's name, which it keeps when the scheduler starts it again; None outside of a job."""
    for scheduler, variable in (("submitit", "SUBMITIT_LOCAL_JOB_ID"), ("slurm", "SLURM_JOB_ID")):
        if number := os.environ.get(variable):
            return f"{scheduler} {number}"
    return None


def is_restart_of(earlier: str | None) -> bool:
    """Whether the scheduler started the job `earlier` again, as this process: after a time limit, a preemption or the
    loss of a machine.

    SLURM counts the restarts of a job. submitit on this machine does not, and runs nothing else in a job.
    """
    counted = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return earlier is not None and earlier == job() and bool(counted)


def check_tasks() -> None:
    """Raise ConfigError where a scheduler started several tasks that know nothing of each other: each would be a run of
    its own, in the same folder.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS), and each would be a run of its own. Start one on each "
            "machine: srun --ntasks=1 ... backend=accelerate, or srun --ntasks-per-node=1 torchrun ... for several"
        )
