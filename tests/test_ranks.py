"""The error of the rank that failed first is the run's, not the connection that broke because of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import tiny
from vlmtune import api
from vlmtune.errors import DataError, TrainingError, VlmtuneError
from vlmtune.launch import ranks, signals


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of a launcher that started two processes, of which this is the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@pytest.mark.usefixtures("store")
def test_the_first_error_that_is_told_is_the_one() -> None:
    assert ranks.told() is None
    ranks.tell(DataError(["a.csv line 3: gone", "a.csv line 4: gone"]))
    ranks.tell(ValueError("later"))
    found = ranks.told()
    assert isinstance(found, DataError)
    assert found.problems == ["rank 1: a.csv line 3: gone", "rank 1: a.csv line 4: gone"]


@pytest.mark.usefixtures("store")
def test_a_broken_connection_gives_way_to_its_cause() -> None:
    ranks.tell(ValueError("boom"))
    for follower in (RuntimeError("Connection closed by peer"), signals.Interrupted(signal.SIGTERM)):
        assert str(api._first_error(follower)) == "rank 1: ValueError: boom"
    own = DataError("my own")
    assert api._first_error(own) is own


@pytest.mark.usefixtures("store")
def test_a_rank_that_was_killed_leaves_a_plain_sentence() -> None:
    """gloo and NCCL say this of it, with places in their own source."""
    for text in ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:18138", "NCCL error: remote error"):
        found = api._first_error(RuntimeError(text))
        assert isinstance(found, TrainingError)
        assert str(found).startswith("another process of this run ended and left no reason")
    bug = RuntimeError("shapes differ")
    assert api._first_error(bug) is bug


@pytest.mark.usefixtures("store")
def test_the_launchers_signal_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes a moment after the connection broke, while the first rank asks what happened."""
    ranks.tell(DataError("gone"))
    real = ranks.told

    def slow() -> VlmtuneError | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return real()

    monkeypatch.setattr(ranks, "told", slow)
    with pytest.raises(DataError, match="rank 1: gone"), signals.ending_at_once(), api._failure_written(tmp_path):
        raise RuntimeError("Connection closed by peer")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]["message"]) == ("failed", "rank 1: gone")


def test_without_a_store_an_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ranks.tell(ValueError("boom"))
    error = RuntimeError("Connection closed by peer")
    assert api._first_error(error) is error


@pytest.mark.slow
def test_two_processes_end_with_the_error_of_the_second(tmp_path: Path) -> None:
    table = tiny.write_csv(tmp_path, [(f"number {i}?", "red") for i in range(12)], per_image=3)
    (tmp_path / "second.py").write_text(
        "import os, vlmtune.batching.loader as b\n"
        "real = b.Batches.__getitem__\n"
        "def failing(self, step):\n"
        "    if os.environ['RANK'] == '1' and step == 2: raise vlmtune.DataError('the disk of the second machine')\n"
        "    return real(self, step)\n"
        "import vlmtune; b.Batches.__getitem__ = failing\n"
        "from vlmtune import cli\n"
        "cli.main('train', cli.train)\n"
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
