"""Whatever fails, and wherever: a run that has its result keeps it, any other leaves one that says what happened."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from vlmtune import run as page
from vlmtune.data import table
from vlmtune.errors import NonFinite, OutOfMemory, StorageError
from vlmtune.launch import signals
from vlmtune.launch.world import ALONE
from vlmtune.record import card, guard, report, runfolder, tracking
from vlmtune.training import checkpoint, finish, scoring
from vlmtune.training.setup import Setup


@dataclass
class Told(tracking.NoTracker):
    """A tracker that notes how the run ended."""

    ends: list[str] = field(default_factory=list)

    def finish(self, summary: Any) -> None:
        self.ends.append(summary["status"])


@pytest.fixture(scope="module")
def built(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A run of one step with an evaluation, ready for it; each test ends it in a folder of its own."""
    folder = tmp_path_factory.mktemp("built")
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, max_steps=1, batch_size=4, eval_baseline=False)
    config.trainer.save_every = 500
    rows = tiny.write_csv(folder, [(f"number {i}?", ("red", "blue")[i % 2]) for i in range(4)])
    config.data.train = config.data.validation = str(rows)
    config.generation.max_new_tokens = 2
    return page.build(config, table.load(config.data, config.task, 0), folder)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    tracker = Told()
    monkeypatch.setattr(tracking, "build", lambda *_, **__: tracking.Surviving("a tracker", tracker))
    return tracker


def ended(run: Setup, folder: Path, **trainer: Any) -> dict[str, Any]:
    """The result of a run that trains its step again, into `folder`."""
    run.optimizer.zero_grad()  # a step that failed leaves its gradients
    config = replace(run.config, trainer=replace(run.config.trainer, **trainer))
    with signals.ending_at_once(), guard.failure_written(folder, ALONE):
        return page.fit(replace(run, config=config, folder=folder))


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    return found


FAULTS: dict[str, Callable[[], BaseException]] = {
    "a full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "a bug": lambda: RuntimeError("shapes differ"),
    "no memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "Ctrl-C": KeyboardInterrupt,
}
ENDS_AS: dict[str, type[BaseException]] = {
    "a full disk": StorageError,
    "a bug": RuntimeError,
    "no memory": OutOfMemory,
    "Ctrl-C": KeyboardInterrupt,
}
BEFORE: dict[str, tuple[Any, str, set[str]]] = {
    "the step": (page, "summed_loss", set()),
    "the checkpoint": (checkpoint, "write", set()),
    "the model": (finish, "save_model", {"checkpoints"}),
    "the evaluation": (scoring, "evaluate", {"checkpoints", "model"}),
    "the result": (runfolder, "make_result", {"checkpoints", "model"}),
}
"""What fails before there is a result: where it is, and what is on disk by then."""
BEHIND: dict[str, tuple[Any, str]] = {
    "the predictions": (runfolder, "write_predictions"),
    "the model card": (card, "write"),
    "the tracker": (Told, "finish"),
    "the report": (report, "write"),
    "the last lines": (runfolder, "closing_table"),
}
"""What fails once there is one."""


def break_it(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: str) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise FAULTS[fault]()

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", BEFORE)
def test_what_fails_before_the_result_is_the_result_and_keeps_what_is_saved(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, fault: str
) -> None:
    owner, name, saved = BEFORE[phase]
    break_it(monkeypatch, owner, name, fault)
    with pytest.raises(ENDS_AS[fault]):
        ended(built, tmp_path)
    result, status = result_of(tmp_path), "interrupted" if fault == "Ctrl-C" else "failed"
    assert result["status"] == status
    assert told.ends == [status]
    assert result["error"]["type"] == ENDS_AS[fault].__name__
    failure = {"no memory": "out_of_memory", "Ctrl-C": "killed"}.get(fault, "other")
    assert result["error"]["failure"] == failure
    assert {"checkpoints", "model"} & {path.name for path in tmp_path.iterdir()} == saved


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", BEHIND)
def test_what_fails_behind_the_result_leaves_it(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, fault: str
) -> None:
    break_it(monkeypatch, *BEHIND[phase], fault)
    if fault == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            ended(built, tmp_path)
    else:
        assert ended(built, tmp_path)["status"] == "completed"
    assert result_of(tmp_path)["status"] == "completed"
    assert (tmp_path / "model" / "adapter_config.json").exists()
    assert told.ends == ([] if phase == "the tracker" else ["completed"])


def test_a_second_signal_behind_the_result_leaves_it(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one comes too late to stop anything; the second one ends the process at once."""
    monkeypatch.setattr(report, "write", lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    with pytest.raises(signals.Interrupted):
        ended(built, tmp_path)
    assert result_of(tmp_path)["status"] == "completed"
    assert told.ends == ["completed"]


def test_an_evaluation_that_fails_can_be_gone_on_with_even_where_no_checkpoint_was_asked_for(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch, scoring, "evaluate", "a bug")
    with pytest.raises(RuntimeError):
        ended(built, tmp_path, save_every=None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_an_evaluation_that_fails_is_the_error_even_where_its_checkpoint_fails_as_well(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_it(monkeypatch, scoring, "evaluate", "a bug")
    break_it(monkeypatch, checkpoint, "write", "a full disk")
    with pytest.raises(RuntimeError, match="shapes differ"):
        ended(built, tmp_path, save_every=None)
    assert result_of(tmp_path)["error"]["type"] == "RuntimeError"
    assert "No space left on device" in caplog.text


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("save_every", [None, 1])
def test_a_weight_that_is_nan_is_never_saved(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int | None
) -> None:
    name, weight = next((name, p) for name, p in built.model.named_parameters() if p.requires_grad)
    before = weight.detach().clone()
    monkeypatch.setattr(page.adapters, "after_step", lambda model, step: weight.data.view(-1)[3].fill_(math.nan))
    try:
        with pytest.raises(NonFinite, match=f"a weight is NaN or infinite after step 1 .*{name}"):
            ended(built, tmp_path, save_every=save_every)
    finally:
        weight.data.copy_(before)
    assert result_of(tmp_path)["error"]["failure"] == "not_finite"
    assert not (tmp_path / "model").exists()
    assert not [*(tmp_path / "checkpoints").glob("*")]


def test_a_metric_that_is_nan_is_null_in_the_result_and_never_the_best(
    built: Setup, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = scoring.evaluate

    def spoiled(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        return replace(found, metrics={**found.metrics, "loss": math.nan})

    monkeypatch.setattr(scoring, "evaluate", spoiled)
    result = ended(built, tmp_path, best_metric="eval/loss", early_stopping_patience=1)
    assert result["status"] == "completed"
    assert result_of(tmp_path)["metrics"]["eval/loss"] is None
    state = json.loads((tmp_path / "checkpoints" / "step_000001" / "state.json").read_text())
    assert (state["progress"]["best"], state["progress"]["since_best"]) == (None, 1)
    assert "loss is nan at step 1, which is never the best" in caplog.text
