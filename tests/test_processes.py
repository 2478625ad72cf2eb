"""Processes that vlmtune starts itself: they find each other, end together, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import vlmtune
from grids import sampled
from vlmtune import backends
from vlmtune.config.schema import BackendConfig
from vlmtune.errors import ConfigError, DataError, TrainingError, VlmtuneError
from vlmtune.launch import processes
from vlmtune.launch.world import ALONE, World
from vlmtune.record import runfolder


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- how many


def test_only_a_process_on_its_own_starts_others() -> None:
    two = BackendConfig("accelerate", 2)
    assert processes.to_start(two, ALONE) == 2
    assert processes.to_start(two, World(rank=1, processes=2)) == 1
    assert processes.to_start(BackendConfig(), ALONE) == 1
    with pytest.raises(ConfigError, match="a launcher started 4 processes"):
        processes.to_start(two, World(processes=4))


def test_one_process_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes.to_start(BackendConfig("accelerate"), ALONE) == 8
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"set backend\.num_processes"):
        processes.to_start(BackendConfig("accelerate"), ALONE)


# ---------------------------------------------------------------- what they are told, and how they end

TOLD = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file: json.dump([os.environ[n] for n in names], file)
"""


def test_each_process_is_told_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.run([*python(TOLD), str(tmp_path)], 2) == 0
    threads = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [rank, rank, "2", "2", "127.0.0.1", threads]


MEETING = """
import os
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30))
rank = os.environ["RANK"]
store.set(f"from {rank}", rank)
assert store.get(f"from {1 - int(rank)}") == str(1 - int(rank)).encode()
"""


@pytest.mark.slow
def test_they_find_each_other() -> None:
    """Through a store that lives in the process that starts them."""
    assert processes.run(python(MEETING), 2) == 0


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1": sys.exit(3)
time.sleep(600)
"""
KILLED = """
import os, signal, time
print("rank 1 was here", flush=True)
if os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
time.sleep(600)
"""
TELLING = """
import os, signal, sys, time
from vlmtune.errors import TrainingError
from vlmtune.launch import ranks
from vlmtune.launch.world import World
if os.environ["RANK"] == "1": time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)
try: ranks.meet(World.from_environment())
except TrainingError as error: print(error, file=sys.stderr); sys.exit(1)
"""
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1": time.sleep(1); sys.exit(3)
time.sleep(600)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    monkeypatch.setattr(processes, "PATIENCE", 1.5)


@pytest.mark.usefixtures("impatient")
def test_one_that_fails_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(TrainingError, match="rank 1: failed with exit code 3"):
        processes.run(python(FAILING), 2)
    assert time.monotonic() - began < 60, "not when they end by themselves"


@pytest.mark.usefixtures("impatient")
def test_one_that_is_killed_is_named_with_its_output() -> None:
    with pytest.raises(TrainingError, match=r"rank 1: killed by SIGKILL, most often .*\nrank 1 was here"):
        processes.run(python(KILLED), 2)


@pytest.mark.slow
def test_the_first_is_told_that_another_was_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that it can end by itself, with the reason as its own error."""
    monkeypatch.setattr(processes, "GRACE", 60)
    assert processes.run(python(TELLING), 2) == 1
    assert capfd.readouterr().err.startswith("rank 1: killed by SIGKILL, most often as the machine is out of memory")


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_one_that_does_not_listen_is_killed() -> None:
    with pytest.raises(TrainingError, match="rank 1: failed with exit code 3"):
        processes.run(python(STUBBORN), 2)


LATE = """
import os, signal, sys, time
def end(number, frame):
    time.sleep(3 * (os.environ["RANK"] == "0"))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
if os.environ["RANK"] == "1": time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""


@pytest.mark.usefixtures("impatient")
def test_after_a_signal_the_first_may_take_longer(capfd: pytest.CaptureFixture[str]) -> None:
    """It writes the report while the others are done; nobody failed."""
    assert processes.run(python(LATE), 2) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == ""


SILENT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
if os.environ["RANK"] == "1": print("no such key"); sys.exit(1)
time.sleep(600)
"""


@pytest.mark.usefixtures("impatient")
def test_what_the_first_cannot_tell_is_shown() -> None:
    with pytest.raises(TrainingError, match="rank 1: failed with exit code 1\nno such key"):
        processes.run(python(SILENT), 2)


ALONE_SIGNALLED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
if os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


@pytest.mark.usefixtures("impatient")
def test_a_signal_to_one_of_them_ends_all() -> None:
    """By whoever sent it; nobody failed."""
    assert processes.run(python(ALONE_SIGNALLED), 2) == 128 + signal.SIGTERM


DEAF = """
import os, signal, time
for name in ("SIGINT", "SIGTERM"): signal.signal(getattr(signal, name), signal.SIG_IGN)
if os.environ["RANK"] == "1":
    for _ in range(3): time.sleep(0.5); os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""


def test_a_third_signal_ends_them_whatever_they_do() -> None:
    """One that reads from a disk that hangs, and another that waits for it in torch, answer no signal."""
    with pytest.raises(TrainingError, match="killed by SIGKILL"):
        processes.run(python(DEAF), 2)


WAITING = """
import os, signal, sys, time
def end(number, frame): sys.exit(100 + number)
for name in ("SIGINT", "SIGTERM", "SIGUSR1"): signal.signal(getattr(signal, name), end)
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file: file.write(str(os.getpid()))
time.sleep(600)
"""
PARENT = """
import sys
from vlmtune.launch import processes
if __name__ == "__main__": sys.exit(processes.run(sys.argv[1:], 2))
"""


def pids(folder: Path) -> list[int]:
    """The processes that have said who they are, once both have."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [(folder / rank).read_text() for rank in "01" if (folder / rank).exists()]
        if len(found) == 2 and all(found):
            return [int(text) for text in found]
        time.sleep(0.05)
    raise AssertionError("they did not start")


SENT = sampled([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL], [signal.SIGUSR1, signal.SIGKILL])


@pytest.mark.parametrize("number", SENT)
def test_they_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([*python(PARENT), *python(WAITING), str(tmp_path)], env=environment)
    children = pids(tmp_path)
    parent.send_signal(number)
    code = parent.wait(timeout=60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 100 + number)
    end = time.monotonic() + 20
    while any(map(is_alive, children)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_error_of_an_earlier_start_is_not_taken_for_this_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A resume that is refused leaves the result that it found."""
    old, new = ({"status": "failed", "error": {"type": "DataError", "message": text}} for text in ("old", "new"))
    runfolder.write_json(tmp_path / "result.json", old)
    monkeypatch.setattr(processes, "run", lambda *_: 1)
    with pytest.raises(TrainingError, match="exit code 1; see the output above"):
        backends.in_processes([], tmp_path, 2)
    monkeypatch.setattr(processes, "run", lambda *_: runfolder.write_json(tmp_path / "result.json", new) or 1)
    with pytest.raises(DataError, match="new"):
        backends.in_processes([], tmp_path, 2)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(12)], per_image=2)

    def make(name: str, *more: str) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none"]
        steps = ["trainer.batch_size=2", "trainer.max_steps=3", "trainer.log_every=1", "trainer.learning_rate=1e-2"]
        return [*model, *steps, "data=csv", f"data.train={table}", f"hydra.run.dir={tmp_path / name}", *more]

    return make


STARTED = ["backend=accelerate", "backend.num_processes=2"]


@pytest.mark.slow
def test_from_python(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    result = vlmtune.train(overrides("run", *STARTED))
    assert (result["status"], result["steps"]) == ("completed", 3)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["devices"]
    (tmp_path / "0.png").unlink()
    with pytest.raises(VlmtuneError, match="no such image"):
        vlmtune.train(overrides("bad", *STARTED))


@pytest.mark.slow
def test_trials_of_a_sweep_have_processes_of_their_own(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    words: list[Any] = ["-m", *overrides("unused", *STARTED), "adapter.r=2,4", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    subprocess.run([sys.executable, "src/train.py", *words], check=True, capture_output=True)
    for trial, rank in (("0", 2), ("1", 4)):
        folder = tmp_path / "sweep" / trial
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
        assert json.loads((folder / "model" / "adapter_config.json").read_text())["r"] == rank
