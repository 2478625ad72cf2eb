"""A rank that dies, fails, leaves or hangs ends the others within seconds, with its own error as the run's, whatever
the ranks are doing; the checkpoints are whole, and no process is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from test_processes import is_alive
from vlmtune import durable
from vlmtune.errors import DISK_FULL

PROGRAM = """
import errno, os, signal, sys, threading, time
from pathlib import Path
import vlmtune
from vlmtune import proof
from vlmtune.batching.loader import Loader
from vlmtune.cli.main import run
from vlmtune.data import table
from vlmtune.evaluation.answering import Answering
from vlmtune.training import checkpoint

folder, rank, phase, action = Path(sys.argv.pop(1)), *sys.argv.pop(1).split(":")
(folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))

def act():
    (folder / "acted").touch()
    if action == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail": raise vlmtune.DataError("the disk of this machine")
    if action == "bug": raise KeyError("unforeseen")
    if action == "memory": raise MemoryError
    if action == "leave": sys.exit(0)
    if action == "hang": time.sleep(600)

def before(owner, name, when=lambda *_: True):
    real = getattr(owner, name)
    def acting(*arguments, **keywords):
        if os.environ["RANK"] == rank and when(*arguments): act()
        return real(*arguments, **keywords)
    setattr(owner, name, acting)

if phase == "rows": before(table, "load")
if phase == "checks": before(proof, "decide")
if phase == "step": before(Loader, "make", lambda loader, step, number: step == 4)
if phase == "evaluation": before(Answering, "add")
if phase == "save":  # the other one dies while the first one writes
    real = checkpoint.write
    def slow(root, snapshot, **keywords):
        time.sleep(4 * (snapshot.step == 4))
        return real(root, snapshot, **keywords)
    checkpoint.write = slow
    from vlmtune.training import saving
    save = saving.Saving.save
    def dying(self):
        if os.environ["RANK"] == rank and self.progress.step == 4: threading.Timer(1, act).start()
        return save(self)
    saving.Saving.save = dying
if phase == "disk":  # of which the first rank learns in its thread, and the others not at all
    save_file = checkpoint.save_file
    def limited(tensors, file):
        if "step_000004" in str(file):
            (folder / "acted").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file)
    checkpoint.save_file = limited
run("train")
"""
OURS = """
import sys
from vlmtune import commands
program = [sys.executable, *(sys.argv.pop(1) for _ in range(3))]
commands.started = lambda name: program
from vlmtune.cli.main import run
run("train")
"""
KILLED, SILENT = "rank 1: killed by SIGKILL", "rank 1 ended and left no reason"
SECONDS = 60
"""In which the others must have ended; alone on a machine it takes 1 to 6."""


@pytest.fixture
def words(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> list[str]:
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(16)], per_image=4)
    model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "generation.max_new_tokens=4"]
    data = ["data=csv", f"data.train={table}", f"data.validation={table}", f"hydra.run.dir={tmp_path / 'run'}"]
    steps = ["trainer.batch_size=2", "trainer.max_steps=8", "trainer.save_every=2", "trainer.eval_every=6"]
    return [*model, *data, *steps, "trainer.eval_baseline=false"]


@pytest.fixture
def launched(words: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts two ranks, of which one does what `case` says; none is left behind."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str, case: str, *more: str) -> subprocess.Popen[str]:
        program = [str(tmp_path / "program.py"), str(tmp_path), case]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
        ours = [sys.executable, "-c", OURS, *program, "backend=accelerate", "backend.num_processes=2"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "output.txt").open("w") as output:
            command = [*(ours if launcher == "ours" else torchrun), *words, *more]
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=SECONDS)


def until_acted(folder: Path) -> None:
    end = time.monotonic() + 300
    while not (folder / "acted").exists():
        assert time.monotonic() < end, (folder / "output.txt").read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "case", "error"),
    [
        ("ours", "1:rows:kill", KILLED),
        ("torchrun", "1:rows:fail", "rank 1: the disk of this machine"),
        ("torchrun", "1:checks:kill", SILENT),
        ("ours", "1:checks:leave", "rank 1: sys.exit(0) was called"),
        ("ours", "1:step:kill", KILLED),
        ("torchrun", "1:step:bug", "rank 1: KeyError: 'unforeseen'"),
        ("ours", "1:step:memory", "rank 1: out of memory"),
        ("ours", "0:step:kill", "rank 0: killed by SIGKILL"),
        ("torchrun", "1:evaluation:leave", "rank 1: sys.exit(0) was called"),
        ("ours", "1:save:kill", KILLED),
        ("torchrun", "1:save:kill", SILENT),
    ],
)
def test_one_ends_all(
    launched: Callable[[str, str], subprocess.Popen[str]], tmp_path: Path, launcher: str, case: str, error: str
) -> None:
    process = launched(launcher, case)
    until_acted(tmp_path)
    assert process.wait(timeout=SECONDS) == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"]["message"].startswith(error)
    assert error in (tmp_path / "output.txt").read_text()
    rank, phase, _ = case.split(":")
    written = 1 if rank == "0" else 2  # the first rank may be killed while it writes the second one
    check_what_is_left(tmp_path, saved=0 if phase in ("rows", "checks") else written)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_full_disk_ends_all_at_the_next_checkpoint(
    launched: Callable[..., subprocess.Popen[str]], tmp_path: Path, launcher: str, sharding: str
) -> None:
    """The first rank raises there what its thread met, and the others wait for it in the step."""
    process = launched(launcher, "0:disk:full", f"sharding={sharding}")
    until_acted(tmp_path)
    assert process.wait(timeout=SECONDS) == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    error = f"{tmp_path / 'run' / 'checkpoints' / 'step_000004'}: can't be written: {DISK_FULL}"
    assert (result["status"], result["steps"], result["error"]["type"]) == ("failed", 6, "CheckpointError")
    assert result["error"]["message"].startswith(error)
    output = (tmp_path / "output.txt").read_text()
    assert output.count(error) == 1, output
    assert launcher == "torchrun" or "Traceback" not in output, "torchrun adds its own"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    check_what_is_left(tmp_path, saved=1)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_one_that_hangs_is_ended_by_the_second_signal(
    launched: Callable[[str, str], subprocess.Popen[str]], tmp_path: Path, phase: str
) -> None:
    """After the first one the step is to be finished, which it never is."""
    process = launched("ours", f"1:{phase}:hang")
    until_acted(tmp_path)
    for _ in range(2):
        time.sleep(1)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=SECONDS) == 128 + signal.SIGINT
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    check_what_is_left(tmp_path, saved=2)


def check_what_is_left(folder: Path, saved: int) -> None:
    """At least so many whole checkpoints, and no process."""
    found = sorted((folder / "run" / "checkpoints").glob("step_*"))
    assert len(found) >= saved
    for checkpoint in found:
        durable.verify(checkpoint)
    ranks = [int((folder / f"pid_{rank}").read_text()) for rank in (0, 1)]
    end = time.monotonic() + 20
    while any(map(is_alive, ranks)):
        assert time.monotonic() < end
        time.sleep(0.05)
