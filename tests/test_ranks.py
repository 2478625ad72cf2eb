"""The error of the rank that failed first is the run's, not the connection that broke because of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import tiny
from vlmtune.errors import DataError, TrainingError, VlmtuneError
from vlmtune.launch import ranks, signals
from vlmtune.launch.world import World
from vlmtune.record import guard


@pytest.fixture
def second() -> Iterator[World]:
    """The second of two processes, with the store of the launcher that started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield World(rank=1, processes=2, address="127.0.0.1", port=port)
    del store


def test_the_first_error_that_is_told_is_the_one(second: World) -> None:
    assert ranks.reported(second) is None
    ranks.report(DataError(["a.csv line 3: gone", "a.csv line 4: gone"]), second)
    ranks.report(ValueError("later"), second)
    found = ranks.reported(second)
    assert isinstance(found, DataError)
    assert found.problems == ["rank 1: a.csv line 3: gone", "rank 1: a.csv line 4: gone"]


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
    assert result["error"] == {"type": "DataError", "message": "rank 1: the disk of the second machine"}
    assert "the disk of the second machine" in (tmp_path / "run" / "train.log").read_text()
