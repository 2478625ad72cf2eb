"""summary.csv: a sweep in one table, whatever became of its trials."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
import vlmtune
from sweep_folders import begin, end, error, log, trial
from vlmtune.errors import CheckpointError
from vlmtune.trials import files, summary
from vlmtune.trials.trial import Trial

FIXED = ["seconds", "rows_per_second", "peak_memory_bytes", "trainable_weights", "folder"]


def describe(sweep: Path, trials: list[Trial]) -> None:
    files.write(sweep, "made", "exact_match", [], [files.describe(one) for one in trials])


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_line_per_trial_says_what_became_of_it(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number) for number in range(5)]
    good, bad, killed, running, _ = trials
    describe(tmp_path, trials[::-1])
    begin(good)
    end(
        good,
        metrics={"baseline/exact_match": 0.1, "eval/exact_match": 0.5},
        speed={"training_seconds": 12.5, "examples_per_second": 32.0},
        memory={"peak_rss_bytes": 2000, "peak_device_bytes": 0},
    )
    end(bad, error=error("config", 'adapter.r: "zero",\n  choose 1'), memory={"peak_device_bytes": 5})
    begin(killed)
    end(killed, error=error("killed", "killed by SIGKILL"), metrics={"eval/exact_match": 0.2, "test/exact_match": 0.3})
    begin(running)
    log(running, 1, train__loss=1.0)
    rows = summary.write(tmp_path)
    metrics = ["baseline/exact_match", "eval/exact_match", "test/exact_match"]
    names = ["trial", "adapter.r", "trainer.learning_rate", "overrides", "status", "failure", "message"]
    assert all([*row] == [*names, *metrics, *FIXED] for row in rows)
    assert [row["trial"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["adapter.r"] for row in rows] == ["1", "2", "4", "8", "16"]
    assert [row["status"] for row in rows] == ["completed", "failed", "failed", "unfinished", "waiting"]
    assert [row["failure"] for row in rows] == [None, "config", "killed", None, None]
    assert rows[1]["message"] == 'adapter.r: "zero", choose 1'
    assert [row["trainable_weights"] for row in rows] == [123, None, 123, 123, None]
    assert [row["peak_memory_bytes"] for row in rows] == [2000, 5, None, None, None]
    assert (rows[0]["seconds"], rows[0]["rows_per_second"]) == (12.5, 32.0)
    assert rows[2]["test/exact_match"] == 0.3
    assert rows[0]["folder"] == str(good.folder)
    written = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert table(tmp_path) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "summary.csv", "sweep.json"]


def test_values_are_those_that_were_typed_and_a_shell_takes_the_overrides(tmp_path: Path) -> None:
    overrides = ["adapter.target_modules=[q_proj,v_proj]", "model.path='a b'", "trainer.learning_rate=1e-4", "data=csv"]
    one = Trial(0, overrides, overrides[:3], tmp_path / "0")
    other = Trial(1, [*overrides[1:3], "+adapter.r=4"], ["+adapter.r=4"], tmp_path / "1")
    describe(tmp_path, [one, other])
    summary.write(tmp_path)
    first, second = table(tmp_path)
    assert first["adapter.target_modules"] == "[q_proj,v_proj]"
    assert (first["model.path"], first["trainer.learning_rate"], first["adapter.r"]) == ("'a b'", "1e-4", "")
    assert (second["model.path"], second["adapter.r"]) == ("", "4")
    assert shlex.split(first["overrides"]) == overrides


@pytest.mark.parametrize(
    ("others", "groups"),
    [
        (["adapter.r=4", "adapter.r=8"], ["adapter.r=4", "adapter.r=4", "adapter.r=8", "adapter.r=8"]),
        ([], ["all", "all"]),
    ],
)
def test_trials_that_differ_in_their_seed_alone_are_one_group(
    tmp_path: Path, others: list[str], groups: list[str]
) -> None:
    swept = [[*([other] if other else []), f"trainer.seed={seed}"] for other in others or [""] for seed in (0, 1)]
    describe(tmp_path, [Trial(number, each, each, tmp_path / str(number)) for number, each in enumerate(swept)])
    rows = summary.write(tmp_path)
    assert [row["group"] for row in rows] == groups
    assert [row["trainer.seed"] for row in rows] == ["0", "1"] * (len(groups) // 2)


def test_without_several_seeds_there_are_no_groups(tmp_path: Path) -> None:
    describe(tmp_path, [trial(tmp_path, 0)])
    assert "group" not in summary.write(tmp_path)[0]


def test_a_damaged_result_is_a_failure_of_its_trial_alone(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number) for number in range(2)]
    describe(tmp_path, trials)
    for each in trials:
        end(each)
    (trials[0].folder / "result.json").write_text("{")
    damaged, whole = summary.write(tmp_path)
    assert (damaged["status"], damaged["failure"], whole["status"]) == ("failed", "other", "completed")
    assert "is damaged" in damaged["message"]


def test_a_folder_of_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a sweep \(it has no sweep\.json\)"):
        summary.write(tmp_path)
    (tmp_path / "sweep.json").write_text('["trials"]')
    with pytest.raises(CheckpointError, match=r"sweep\.json: is damaged"):
        summary.write(tmp_path)
    assert not (tmp_path / "summary.csv").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_real_runs_fill_every_column(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    """And one that its data ends says why."""
    rows = tiny.write_csv(tmp_path, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(8)])
    words = [*runs.words(checkpoint_of("qwen2_vl"), rows), f"data.validation={rows}", "trainer.batch_size=4"]
    words += ["trainer.max_steps=2", "generation.max_new_tokens=4", "adapter=lora"]
    swept = [["adapter.r=4"], ["data.train=gone.csv"]]
    trials = [Trial(number, [*words, *own], own, tmp_path / str(number)) for number, own in enumerate(swept)]
    describe(tmp_path, trials)
    result: dict[str, Any] = vlmtune.train([*trials[0].overrides, f"hydra.run.dir={trials[0].folder}"])
    with pytest.raises(vlmtune.VlmtuneError):
        vlmtune.train([*trials[1].overrides, f"hydra.run.dir={trials[1].folder}"])
    good, bad = summary.write(tmp_path)
    trained = sum(tensor.numel() for tensor in runs.weights(trials[0].folder).values())
    assert good["trainable_weights"] == trained > 0
    assert json.loads((trials[0].folder / "environment.json").read_text())["total_steps"] == 2
    assert {name: good[name] for name in result["metrics"]} == result["metrics"]
    assert all(good[name] is not None for name in FIXED)
    assert good["peak_memory_bytes"] > 1e7
    assert (bad["status"], bad["failure"]) == ("failed", "data")
    assert "gone.csv" in bad["message"]
