"""Checkpoints are written while training goes on: what is written is what was copied, and no failure is lost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vlmtune
from vlmtune.errors import CheckpointError, NonFinite
from vlmtune.record import runfolder
from vlmtune.training import Stopping, checkpoint
from vlmtune.training.saving import Saving

SECONDS = 20
"""That a test waits for a thread: it would hang otherwise."""
FULL = CheckpointError("the disk is full")


class Disk:
    """In place of `checkpoint.write`: it waits until it is let go, and may refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.real, self.free, self.asked = checkpoint.write, threading.Event(), threading.Event()
        self.steps: list[int] = []
        self.error: Exception | None = None
        monkeypatch.setattr(checkpoint, "write", self.write)

    def write(self, root: Path, taken: Any, *, keep: int) -> Path:
        self.asked.set()
        assert self.free.wait(SECONDS), "nobody waits for the disk, or training does"
        if self.error is not None:
            raise self.error
        self.steps.append(taken.step)
        return self.real(root, taken, keep=keep)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def run(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> tiny.Run:
    config = tiny.config(checkpoint_of("qwen2_vl"), max_steps=6, save_every=1, best_metric="eval/loss")
    run = tiny.assemble(config, tiny.records(8))
    run.folder = tmp_path
    return run


def saving_of(run: tiny.Run) -> Saving:
    saving = Saving(run, Stopping(run))
    saving.progress = run.progress
    return saving


def moments_of(run: tiny.Run) -> dict[int, torch.Tensor]:
    return {number: state["exp_avg"].clone() for number, state in run.optimizer.state_dict()["state"].items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_what_is_written_is_the_step_that_was_copied(run: tiny.Run, disk: Disk, tmp_path: Path) -> None:
    """Weights, moments and progress change while the disk is slow."""
    with saving_of(run) as saving:
        run.fit(stop_after=2)
        wanted, moments = run.weights(), moments_of(run)
        run.progress.changes.append({"key": "before"})
        saving.save()
        run.progress.changes[0]["key"] = "after"
        run.fit(stop_after=4)
        disk.free.set()
    assert names(tmp_path) == ["step_000002"]
    found = checkpoint.load_checkpoint(
        tmp_path / "checkpoints" / "step_000002", run.model, run.optimizer, None, saving.identity
    )
    assert (found.step, found.changes) == (2, [{"key": "before"}])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run.weights().items())
    assert all(torch.equal(tensor, moments[number]) for number, tensor in moments_of(run).items())


def test_the_next_one_waits_for_the_one_before(run: tiny.Run, disk: Disk, tmp_path: Path) -> None:
    """So that memory holds one copy."""
    with saving_of(run) as saving:
        run.fit(stop_after=1)
        saving.save()
        assert disk.asked.wait(SECONDS)
        run.fit(stop_after=2)
        second = threading.Thread(target=saving.save)
        second.start()
        second.join(0.2)
        assert second.is_alive()
        disk.free.set()
        second.join(SECONDS)
        assert disk.steps[0] == 1
    assert disk.steps == [1, 2]
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_the_best_one_is_not_written_again_as_the_one_of_its_step(run: tiny.Run, disk: Disk) -> None:
    disk.free.set()
    with saving_of(run) as saving:
        run.fit(stop_after=1)
        saving.save()
        saving.save()
        run.progress.since_best = 1
        saving.save()
    assert disk.steps == [1, 1]


@pytest.mark.parametrize("where", ["save", "wait", "restore_best", "__exit__"])
def test_a_failed_write_is_raised_by_whatever_comes_next(run: tiny.Run, disk: Disk, where: str) -> None:
    disk.error = FULL
    run.fit(stop_after=1)

    def later() -> None:
        with saving_of(run) as saving:
            saving.save()
            disk.free.set()
            run.fit(stop_after=2)
            run.progress.best_step = 1
            if where != "__exit__":
                getattr(saving, where)()
                pytest.fail("nothing was raised")

    with pytest.raises(CheckpointError, match="the disk is full"):
        later()


def ended_by_nan(run: tiny.Run, *, then: Callable[[], Any]) -> None:
    """A run that fails while a checkpoint is being written; `then` comes before that."""
    run.fit(stop_after=1)
    with saving_of(run) as saving:
        saving.save()
        then()
        raise NonFinite("loss nan")


def test_another_error_waits_for_the_write(run: tiny.Run, disk: Disk, tmp_path: Path) -> None:
    """A checkpoint that was copied is worth having."""
    with pytest.raises(NonFinite):
        ended_by_nan(run, then=threading.Timer(0.1, disk.free.set).start)
    assert names(tmp_path) == ["step_000001"]


def test_another_error_comes_first(run: tiny.Run, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.error = FULL
    with pytest.raises(NonFinite):
        ended_by_nan(run, then=disk.free.set)
    assert "the last checkpoint was not written: the disk is full" in caplog.text


def test_a_damaged_best_one_leaves_the_last_weights(run: tiny.Run, caplog: pytest.LogCaptureFixture) -> None:
    with saving_of(run) as saving:
        run.fit(stop_after=1)
        run.progress.best_step = 1
        saving.save()
        run.fit(stop_after=2)
        saving.wait()
        wanted = run.weights()
        os.truncate(run.folder / "checkpoints" / "step_000001" / "model.safetensors", 99)
        assert not saving.restore_best()
    assert "can't use the best checkpoint, so the final model is that of the last step" in caplog.text
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run.weights().items())


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> list[str]:
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", "red") for i in range(8)], per_image=2)
    model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none"]
    data = ["data=csv", f"data.train={table}", "trainer.batch_size=4", "trainer.max_steps=3"]
    return [*model, *data, "trainer.log_every=1", f"hydra.run.dir={tmp_path / 'run'}"]


def test_a_run_ends_when_its_last_checkpoint_is_written(
    overrides: list[str], disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is let go by whoever waits for it."""
    written, result, wait = [], runfolder.make_result, Saving.wait

    def waiting(self: Saving) -> None:
        if not self.writing.done():
            disk.free.set()
        wait(self)

    monkeypatch.setattr(Saving, "wait", waiting)
    monkeypatch.setattr(runfolder, "make_result", lambda *given: written.extend(disk.steps) or result(*given))
    assert vlmtune.train([*overrides, "trainer.save_every=5"])["status"] == "completed"
    assert written == [3]
    assert names(tmp_path / "run") == ["step_000003"]


def test_a_run_whose_last_checkpoint_fails_is_no_complete_one(
    overrides: list[str], disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.error = FULL
    disk.free.set()
    with pytest.raises(CheckpointError, match="the disk is full"):
        vlmtune.train([*overrides, "trainer.save_every=5"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("failed", 3)
    assert names(tmp_path / "run") == []
