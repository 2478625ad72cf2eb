"""A sweep in W&B: one group, names that say what differs, and a run that shows all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import wandb_offline
from vlmtune.config.schema import TrackerConfig
from vlmtune.record import place, runfolder, tracking, wandb_tracker
from vlmtune.trials import files
from vlmtune.trials.trial import Trial

CONFIG: dict[str, Any] = {"model": {"name": "pico"}, "adapter": {"method": "lora"}, "task": {"name": "vqa"}}
VARIABLES = ("WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE", "WANDB_TAGS")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "sweeps" / "ranks" / "2026-11-27"
    swept = ["adapter.r=8", "trainer.learning_rate=0.0002"]
    folder.mkdir(parents=True)
    files.write(folder, "ranks", "exact_match", [], [files.describe(Trial(0, swept, swept, folder / "0"))])
    return folder


def run_record(folder: Path) -> Any:
    """What W&B was told about the run."""
    wandb_offline.read(folder)  # which waits until W&B has written all
    (log,) = folder.rglob("run-*.wandb")
    return next(each.run for each in wandb_offline.records(log) if each.WhichOneof("record_type") == "run")


def track(folder: Path, *, resumed: bool = False) -> None:
    tracking.build(TrackerConfig(name="wandb"), CONFIG, folder, resumed=resumed).finish({"status": "completed"})


def test_a_trial_is_named_after_what_differs_in_its_sweeps_group(sweep: Path) -> None:
    track(sweep / "0")
    found = run_record(sweep / "0")
    assert (found.run_group, found.display_name, found.job_type) == ("ranks/2026-11-27", "r=8 lr=2e-4", "trial")
    assert list(found.tags) == ["pico", "lora", "vqa", "ranks"]
    assert wandb_offline.read(sweep / "0")["config"]["model"] == {"name": "pico"}


def test_a_run_of_its_own_is_no_trial(tmp_path: Path) -> None:
    found = place.of(tmp_path / "outputs" / "runs" / "2026-11-27_10-00-00", CONFIG)
    assert found["job_type"] == "train"
    assert found["group"] is None
    assert found["name"] == "outputs/runs/2026-11-27_10-00-00"


def test_variables_win(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("g", "n", "j", "t"), strict=True):
        monkeypatch.setenv(name, value)
    track(sweep / "0")
    found = run_record(sweep / "0")
    assert (found.run_group, found.display_name, found.job_type, list(found.tags)) == ("g", "n", "j", ["t"])


def test_the_summary_run_shows_the_sweep(sweep: Path) -> None:
    (sweep / "compare.html").write_text("<p>ranked</p>")
    rows = [
        {"trial": 0, "adapter.r": "8", "overrides": "adapter.r=8", "status": "completed", "eval/exact_match": 0.5},
        {"trial": 1, "adapter.r": "16", "overrides": "adapter.r=16", "status": "failed", "eval/exact_match": None},
    ]
    wandb_tracker.summary(sweep, rows, "eval/exact_match", None, "offline")
    found = wandb_offline.read(sweep)
    record = run_record(sweep)
    assert (record.run_group, record.job_type, list(record.tags)) == ("ranks/2026-11-27", "sweep", ["ranks"])
    (row,) = found["history"]
    assert {name.split("/path")[0] for name in row if name.endswith("/path")} >= {"trials", "compare"}
    tables = [Path(file) for file in (sweep / "wandb").rglob("*.table.json")]
    assert any('"adapter.r"' in file.read_text() and '"16"' in file.read_text() for file in tables)
    assert runfolder.read_result(sweep) is None  # it is no run folder
