"""The error of the rank that failed first is the run's, not the connection that broke because of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import tiny
from vlmtune.errors import ConfigError, DataError, TrainingError, VlmtuneError
from vlmtune.launch import ranks, signals
from vlmtune.launch.world import World
from vlmtune.record import guard

SECONDS = 60
"""That a test waits for a thread: it would hang otherwise."""


@pytest.fixture
def second() -> Iterator[World]:
    """The second of two processes, with the store of the launcher that started them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield World(rank=1, processes=2, address="127.0.0.1", port=store.port, has_agent=True)
    del store


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks have joined."""
    monkeypatch.setattr(ranks, "_met", lambda: True)


@pytest.mark.usefixtures("met")
def test_the_first_error_that_is_told_is_the_one(second: World) -> None:
    assert ranks.reported(second) is None
    ranks.report(DataError(["a.csv line 3: gone", "a.csv line 4: gone"]), second)
    ranks.report(ValueError("later"), second)
    found = ranks.reported(second)
    assert isinstance(found, DataError)
    assert found.problems == ["rank 1: a.csv line 3: gone", "rank 1: a.csv line 4: gone"]


@pytest.mark.usefixtures("met")
def test_a_broken_connection_gives_way_to_its_cause(second: World) -> None:
    ranks.report(ValueError("boom"), second)
    for follower in (RuntimeError("Connection closed by peer"), signals.Interrupted(signal.SIGTERM)):
        assert str(guard.first_error(follower, second)) == "rank 1: ValueError: boom"
    own = DataError("my own")
    assert guard.first_error(own, second) is own


def test_a_rank_that_was_killed_leaves_a_plain_sentence(second: World) -> None:
    """gloo and NCCL say this of it, with places in their own source."""
    for text in ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:18138", "NCCL error: remote error"):
        found = guard.first_error(RuntimeError(text), second)
        assert isinstance(found, TrainingError)
        assert str(found).startswith("another process of this run ended and left no reason")
    bug = RuntimeError("shapes differ")
    assert guard.first_error(bug, second) is bug


@pytest.mark.usefixtures("met")
def test_the_launchers_signal_does_not_hide_the_error(
    second: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes a moment after the connection broke, while the first rank asks what happened."""
    ranks.report(DataError("gone"), second)
    real = ranks.reported

    def slow(world: World) -> VlmtuneError | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(world)

    monkeypatch.setattr(ranks, "reported", slow)
    with (
        pytest.raises(DataError, match="rank 1: gone"),
        signals.ending_at_once(),
        guard.failure_written(tmp_path, second),
    ):
        raise RuntimeError("Connection closed by peer")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]["message"]) == ("failed", "rank 1: gone")


# ---------------------------------------------------------------- a rank that is gone


def ended() -> int:
    """The id of a process that no longer runs."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_launchers_signal_is_told_from_a_schedulers(second: World) -> None:
    """torchrun ends the first rank by the same SIGTERM where another one was killed."""
    signalled = signals.Interrupted(signal.SIGTERM)
    with ranks.reporting(second):
        assert guard.first_error(signalled, second) is signalled  # the other one still runs
    assert guard.first_error(signalled, second) is signalled  # it has ended in good order
    ranks._store(second).set("process 1", f"{ended()} {socket.gethostname()}")
    assert str(guard.first_error(signalled, second)).startswith("rank 1 ended and left no reason")
    ranks._store(second).set("process 1", f"{ended()} another-machine")
    assert guard.first_error(signalled, second) is signalled


@pytest.mark.parametrize("stop", [signals.Interrupted(signal.SIGINT), KeyboardInterrupt()])
def test_where_a_signal_ended_another_rank_it_ends_the_run(second: World, stop: BaseException) -> None:
    """The second Ctrl-C, for instance, while one reads from a disk that hangs and the first one waits for it."""
    with pytest.raises(type(stop)), ranks.reporting(second):
        raise stop
    found = guard.first_error(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), second)
    assert isinstance(found, signals.Interrupted)
    assert found.number == signal.SIGINT


def test_what_follows_from_another_rank_is_no_error_of_its_own(second: World) -> None:
    """Of three ranks the second is killed: what the third sees of it is not the reason."""
    with pytest.raises(TrainingError, match="left no reason"), ranks.reporting(second):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:18138")
    assert ranks.reported(second) is None


@pytest.mark.usefixtures("met")
@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_must_not_leave_without_a_word(second: World, code: int) -> None:
    """With code 0 a launcher would wait for the others for ever."""
    with pytest.raises(TrainingError), ranks.reporting(second):
        sys.exit(code)
    assert str(ranks.reported(second)) == f"rank 1: sys.exit({code}) was called"


@pytest.mark.usefixtures("met")
def test_an_unexpected_error_of_another_rank_comes_with_its_traceback(
    second: World, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="boom"), ranks.reporting(second):
        raise ValueError("boom")
    assert "ValueError: boom" in str(ranks.reported(second))
    assert "test_ranks.py" in caplog.text


# ---------------------------------------------------------------- meeting


def test_ranks_go_on_when_all_are_there(second: World) -> None:
    first = replace(second, rank=0)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(ranks.meet, first)
        time.sleep(3 * ranks.POLL)
        assert not early.done()
        ranks.meet(second)
        early.result(timeout=SECONDS)


def test_a_rank_that_fails_before_is_not_waited_for(second: World) -> None:
    first = replace(second, rank=0)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ranks.meet, first)
        ranks.report(DataError("vqa.csv: no such file"), second)
        with pytest.raises(DataError, match=r"rank 1: vqa\.csv: no such file"):
            waiting.result(timeout=SECONDS)


@pytest.mark.usefixtures("met")
def test_an_error_is_no_error_of_the_next_run_or_start(second: World) -> None:
    ranks.report(DataError("gone"), second)
    assert ranks.reported(replace(second, attempt=1)) is None
    with ranks.closed_at_exit(World()):
        assert ranks.reported(second) is not None
    assert ranks.reported(second) is None


def test_where_the_first_rank_does_not_listen_the_error_is_shown(
    second: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks, "UNHEARD", 0.2)
    ranks.report(DataError("gone"), second)
    assert "rank 1: gone" in caplog.text


def test_a_launcher_that_is_no_more_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables may be left over in a shell."""
    monkeypatch.setattr(ranks, "SECONDS", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = World(rank=0, processes=2, address="127.0.0.1", port=free.getsockname()[1], has_agent=True)
        with pytest.raises(ConfigError, match=r"MASTER_PORT=\d+\) does not answer"):
            ranks.meet(world)


def test_without_a_store_an_error_stays_what_it_is() -> None:
    world = World(rank=1, processes=2)
    ranks.report(ValueError("boom"), world)
    error = RuntimeError("Connection closed by peer")
    assert guard.first_error(error, world) is error


@pytest.mark.slow
def test_two_processes_end_with_the_error_of_the_second(tmp_path: Path) -> None:
    table = tiny.write_csv(tmp_path, [(f"number {i}?", "red") for i in range(12)], per_image=3)
    (tmp_path / "second.py").write_text(
        "import os, vlmtune.batching.loader as b\n"
        "real = b.Loader.make\n"
        "def failing(self, step, number):\n"
        "    if os.environ['RANK'] == '1' and step == 2: raise vlmtune.DataError('the disk of the second machine')\n"
        "    return real(self, step, number)\n"
        "import vlmtune; b.Loader.make = failing\n"
        "from vlmtune.cli.main import run\n"
        "run('train')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "second.py")]
    words = [
        "data=csv",
        f"data.train={table}",
        "tracker=none",
        "trainer.batch_size=2",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == {
        "type": "DataError",
        "failure": "data",
        "message": "rank 1: the disk of the second machine",
    }
    assert "the disk of the second machine" in (tmp_path / "run" / "train.log").read_text()
