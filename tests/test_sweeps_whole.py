"""Whole sweeps of `train -m`: what fails, is killed or stopped, and what goes on afterwards."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

import runs
import tiny
import wandb_offline
from vlmtune import comparison
from vlmtune.config.schema import home
from vlmtune.errors import ConfigError
from vlmtune.trials import files


@pytest.fixture(scope="module")
def words(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of some twenty steps over a few images, each shown several times, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("rows")
    table = tiny.write_csv(folder, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(16)], per_image=2)
    steps = ["trainer.batch_size=4", "trainer.max_steps=24", "trainer.log_every=1", "trainer.save_every=1"]
    rest = ["trainer.eval_every=null", "trainer.eval_baseline=false", "generation.max_new_tokens=2"]
    validation = f"data.validation={table}"
    return [*runs.words(checkpoint_of("qwen2_vl"), table), validation, *steps, *rest, "adapter.lora_dropout=0.2"]


@contextmanager
def started(*words: str, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(home() / "src" / "train.py"), *words]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(*words: str, folder: Path | None = None) -> tuple[int, str]:
    """The exit code of a command, and what it says."""
    with started(*words, folder=folder) as process:
        _, said = process.communicate(timeout=600)
        return process.returncode, said


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a run has saved so many steps or more: it removes its older checkpoints. `process`: of the sweep."""
    end = time.monotonic() + 300
    while max((int(each.name[5:]) for each in run.glob("checkpoints/step_??????")), default=0) < step:
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def process_of(run: Path) -> int:
    """The process that holds a run folder."""
    return int((run / ".lock").read_text().split()[1])


def test_six_trials_of_pico_of_which_three_fail(tmp_path: Path) -> None:
    """One is killed, one diverges and one has a bad value: each failure has its type, and the others are compared.
    Resumed, the killed one is completed. W&B has one group.
    """
    sweep = tmp_path / "sweeps" / "rates" / "stamp"
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(16)], per_image=2)
    size = ["data=csv", f"data.train={table}", f"data.validation={table}", "trainer.batch_size=8"]
    often = [
        "trainer.max_steps=30",
        "trainer.save_every=1",
        "trainer.log_every=1",
        "trainer.eval_baseline=false",
        "trainer.eval_every=null",
    ]
    swept = "trainer.learning_rate=1e-3,1e30,3e-3,-1,4e-3,5e-3"
    with started("-m", *size, *often, swept, "adapter.lora_dropout=0", f"hydra.sweep.dir={sweep}") as process:
        wait_for_step(sweep / "4", 1, process)
        os.kill(process_of(sweep / "4"), signal.SIGKILL)
        said = process.communicate(timeout=600)
        assert process.returncode == 1, said
    rows = summary_of(sweep)
    assert [row["status"] for row in rows] == ["completed", "failed", "completed", "failed", "failed", "completed"]
    assert [row["failure"] for row in rows] == ["", "not_finite", "", "config", "killed", ""]
    assert rows[0]["trainer.learning_rate"] == "0.001"
    assert "compare.html" in "".join(said)

    first = (sweep / "0" / "result.json").stat().st_mtime_ns
    code, said_again = ended("-m", f"resume={sweep}")
    assert code == 1, said_again
    assert [row["failure"] for row in summary_of(sweep)] == ["", "not_finite", "", "config", "", ""]
    assert (sweep / "0" / "result.json").stat().st_mtime_ns == first
    compared = comparison.compare([sweep])
    assert sorted(entry.name for entry in compared.entries) == ["0", "2", "4", "5"]
    assert {name for name, _ in left_out(compared)} == {"1", "3"}
    placed = wandb_offline.places(sweep)
    assert {group for group, _ in placed} == {"rates/stamp"}
    assert len([kind for _, kind in placed if kind == "trial"]) >= 4
    assert [kind for _, kind in placed if kind == "sweep"]


def summary_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def left_out(compared: comparison.Comparison) -> list[tuple[str, str]]:
    return [(run.name, reason) for run, reason in compared.left_out]


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_nothing_had_happened(words: list[str], tmp_path: Path) -> None:
    """Eight trials, all of its processes killed in the middle of one, against a search that nothing disturbed."""
    quick = ["trainer.max_steps=3", "trainer.learning_rate=tag(log,interval(1e-4,1e-2))", "adapter.r=2,4"]
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.seed=1", *words, *quick]
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    with started(*search, f"hydra.sweep.dir={killed}") as process:
        wait_for_step(killed / "3", 1, process)
        trial = process_of(killed / "3")
        process.kill()
        os.kill(trial, signal.SIGKILL)
        process.communicate()
    finished = (killed / "0" / "result.json").stat().st_mtime_ns
    assert not (killed / "4").exists()
    code, said = ended("-m", f"resume={killed}")
    assert code == 0, said
    assert ended(*search, f"hydra.sweep.dir={straight}")[0] == 0
    assert (killed / "0" / "result.json").stat().st_mtime_ns == finished
    found, wanted = (
        [(row["overrides"], row["status"], row["eval/loss"]) for row in summary_of(sweep)]
        for sweep in (killed, straight)
    )
    assert len(found) == 8
    assert found == wanted
    studies = [
        optuna.load_study(study_name=None, storage=f"sqlite:///{sweep}/study.db") for sweep in (killed, straight)
    ]
    assert [len(study.trials) for study in studies] == [8, 8]
    assert studies[0].best_trial.number == studies[1].best_trial.number


@pytest.mark.slow
def test_one_is_killed_one_can_not_begin_and_one_is_fine(words: list[str], tmp_path: Path) -> None:
    """Resumed, the killed one ends as if nothing had happened, and the others stay as they are."""
    sweep, straight = tmp_path / "sweep", tmp_path / "straight"
    with started("-m", *words, "adapter.r=2,-1,4", f"hydra.sweep.dir={sweep}") as process:
        wait_for_step(sweep / "2", 3, process)
        os.kill(process_of(sweep / "2"), signal.SIGKILL)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 1, said
    results = [result(sweep / number) for number in "012"]
    assert [each["status"] for each in results] == ["completed", "failed", "failed"]
    assert [(each["error"] or {}).get("failure") for each in results] == [None, "config", "killed"]
    assert "`r` should be a positive integer" in results[1]["error"]["message"]
    assert (sweep / "0" / ".hydra" / "overrides.yaml").exists()
    recorded = json.loads((sweep / "sweep.json").read_text())
    assert [trial["swept"] for trial in recorded["trials"]] == [["adapter.r=2"], ["adapter.r=-1"], ["adapter.r=4"]]
    finished = (sweep / "0" / "result.json").stat().st_mtime_ns

    code, said = ended("-m", f"resume={sweep}")
    assert code == 1, said
    assert [result(sweep / number)["status"] for number in "012"] == ["completed", "failed", "completed"]
    assert (sweep / "0" / "result.json").stat().st_mtime_ns == finished
    assert ended(*words, "adapter.r=4", f"hydra.run.dir={straight}")[0] == 0
    assert runs.losses(sweep / "2") == runs.losses(straight)
    code, said = ended("-m", *words, "adapter.r=2,-1,4", f"hydra.sweep.dir={sweep}")
    assert code == 1
    assert "holds a sweep already" in said


@pytest.mark.slow
def test_another_launcher_leaves_the_same_files_and_last_lines(words: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    given = ["-m", "hydra/launcher=basic", *words, "adapter.r=2,-1,4", f"hydra.sweep.dir={sweep}"]
    for line in (given, ["-m", f"resume={sweep}"]):
        code, said = ended(*line)
        assert code == 1, said
        assert "1: failed: config: " in said
        assert f"compared     {sweep / 'compare.html'}" in said
        with (sweep / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["adapter.r"] for row in rows] == ["2", "-1", "4"]
        assert [row["status"] for row in rows] == ["completed", "failed", "completed"]
    code, said = ended(*given)
    assert code == 1
    assert "holds a sweep already" in said


def test_two_at_once_share_features_and_give_the_numbers_of_one_after_another(words: list[str], tmp_path: Path) -> None:
    given = ["-m", *words, "trainer.max_steps=6", "trainer.save_every=null", "trainer.learning_rate=1e-3,1e-2"]
    kept = ["hydra.launcher.keep_features=true", "hydra.launcher.parallel=2"]
    for name, settings in (("one", []), ("two", kept)):
        code, said = ended(*given, f"hydra.sweep.dir={name}", *settings, folder=tmp_path)
        assert code == 0, said
        for number in "01":
            assert "features   cached on disk" in (tmp_path / name / number / "train.log").read_text()
    for number in "01":
        assert runs.losses(tmp_path / "one" / number) == runs.losses(tmp_path / "two" / number)
    assert not (tmp_path / "one" / "features").exists()
    assert list((tmp_path / "two" / "features").rglob("*.safetensors"))
    assert not list((tmp_path / "two" / "features").rglob("*.part"))
    log = (tmp_path / "one" / "1" / "train.log").read_text()
    assert "image features: 0 computed" in log, "the second trial found those of the first one"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on(words: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    with started("-m", *words, "adapter.r=2,4", f"hydra.sweep.dir={sweep}") as process:
        wait_for_step(sweep / "0", 2, process)
        process.send_signal(signal.SIGINT)
        with pytest.raises(ConfigError, match="is in use by process"):
            files.check_free(sweep, resumed=True)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 130, said
    assert f"-m resume={sweep}" in said
    assert result(sweep / "0")["status"] == "interrupted"
    assert not (sweep / "1").exists()
    before = len(runs.losses(sweep / "0"))
    assert 2 <= before < 24
    code, said = ended("-m", f"resume={sweep}")
    assert code == 0, said
    assert [len(runs.losses(sweep / number)) for number in "01"] == [24, 24]
