"""A run folder has one running process; how it ends does not matter."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlmtune import api
from vlmtune.config.schema import Config
from vlmtune.errors import ConfigError, DataError
from vlmtune.launch import lock

HOLDER = """
import os, signal, sys, time, warnings; sys.path.insert(0, "src")
from pathlib import Path
from vlmtune.launch import lock
warnings.simplefilter("ignore")
with lock.held(Path(sys.argv[1])):
    child = os.fork()  # as a loader's process: it outlives its parent
    if child == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_names_its_process(tmp_path: Path) -> None:
    with lock.held(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
        lock.check(tmp_path)
    with lock.held(tmp_path), pytest.raises(ConfigError, match="in use by"), lock.held(tmp_path):
        pass
    lock.check(tmp_path)
    with lock.held(tmp_path):
        pass


def test_a_killed_process_holds_nothing_though_its_children_live(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            lock.check(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # is alive
        lock.check(tmp_path)
        with lock.held(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)


def _sleep(ready: Any) -> None:
    ready.set()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_started_inside_does_not_go_on_holding(tmp_path: Path, method: str) -> None:
    with lock.held(tmp_path):
        context = multiprocessing.get_context(method)
        ready = context.Event()
        worker = context.Process(target=_sleep, args=(ready,))
        worker.start()
        ready.wait()
        with pytest.raises(ConfigError, match="in use"):
            lock.check(tmp_path)
    lock.check(tmp_path)
    worker.kill()
    worker.join()


def test_a_process_that_runs_many_trials_keeps_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for a fork stays so until the process ends, and is called at each."""
    calls: list[object] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **kinds: calls.append(kinds))
    for number in range(3):
        with lock.held(tmp_path / str(number)):
            assert len(lock.HELD) == 1
    assert not lock.HELD
    assert not calls


def test_a_stale_file_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text("process 1 on elsewhere")
    lock.check(tmp_path)


def test_starting_or_resuming_a_running_run_is_one_error(tmp_path: Path) -> None:
    """Exit code 1, before anything of the folder changes: Hydra would write its own files into it first."""
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    with lock.held(tmp_path):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for words in ([f"hydra.run.dir={tmp_path}", "tracker=none"], [f"resume={tmp_path}"]):
            command = [sys.executable, "src/train.py", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 1
            assert done.stderr == (
                f"config error: {tmp_path}: is in use by process {os.getpid()} on {os.uname().nodename}; "
                "wait for that run, or stop it\n"
            )
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_leaves_its_folder_free(tmp_path: Path) -> None:
    import tiny

    config: Config = tiny.config(None)
    config.data.train = str(tmp_path / "gone.csv")
    with pytest.raises(DataError):
        api.run_in(tmp_path / "run", config)
    lock.check(tmp_path / "run")


def test_a_place_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(ConfigError, match="can't be written: Is a directory"), lock.held(tmp_path):
        pass
