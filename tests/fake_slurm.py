"""SLURM's commands for a cluster of one machine and one job, which runs what it is given for real.

`install` puts them into a folder for PATH. What they know of the job lies in the folder FAKE_SLURM: `task`, the process
that srun started; `script`, that of the batch script; `starts`, one line for each; `code`, once the job has ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sacct")
JOB = "4711"


def install(folder: Path) -> dict[str, str]:
    """The commands in `folder`, and the environment that finds them."""
    for command in COMMANDS:
        (folder / command).write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {command} "$@"\n')
        (folder / command).chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def sbatch(*words: str) -> None:
    """Submit a script with its arguments."""
    program = [sys.executable, __file__, "job", *words]
    subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {JOB}")


def job(folder: Path, *words: str) -> None:
    """Run a submitted script, as often as it is requeued."""
    node = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1"}
    given = {**os.environ, **node, "SLURM_JOB_ID": JOB, "SLURM_GPUS_ON_NODE": "2", "SLURM_PROCID": "0"}
    code, restarts = 0, 0
    while restarts == 0 or (folder / "requeue").exists():
        (folder / "requeue").unlink(missing_ok=True)
        with (folder / "starts").open("a") as starts, (folder / "log").open("a") as log:
            starts.write("started\n")
            counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
            script = subprocess.Popen(["bash", *words], env={**given, **counted}, stdout=log, stderr=log)
            (folder / "script").write_text(str(script.pid))
            code, restarts = script.wait(), restarts + 1
    (folder / "code").write_text(str(code))


def srun(folder: Path, *words: str) -> None:
    """Become the task, with its output where it is to go."""
    rest = list(words)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            file = rest.pop(0).replace("%j", JOB).replace("%t", "0")
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    (folder / "task").write_text(str(os.getpid()))
    os.execvpe(rest[0], rest, {**os.environ, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})


def scontrol(folder: Path, *words: str) -> None:
    if words[0] == "requeue":
        assert words[1] == JOB
        (folder / "requeue").touch()
    else:
        assert words == ("show", "hostnames", "localhost")
        print("localhost")


def scancel(folder: Path, *words: str) -> None:
    """Signal the task, and not the script: as SLURM does it for any signal but SIGKILL."""
    assert words == ("--signal=TERM", JOB)
    os.kill(int((folder / "task").read_text()), signal.SIGTERM)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")


if __name__ == "__main__":
    name, given = sys.argv[1], sys.argv[2:]
    folder = [Path(os.environ["FAKE_SLURM"])] if name not in ("sbatch", "sacct") else []
    globals()[name](*folder, *given)
