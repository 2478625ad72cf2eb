"""Sweeps and runs as jobs: submitit's own processes on this machine, and SLURM's commands as `fake_slurm` has them."""

from __future__ import annotations

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

import pytest
from submitit.core.utils import UncompletedJobError

import fake_slurm
import tiny
import vlmtune
from runs import assert_same_weights
from vlmtune.config import compose, launchers
from vlmtune.config.schema import home
from vlmtune.errors import ConfigError, TrainingError
from vlmtune.launch.world import World
from vlmtune.trials import submitted

LOCAL, SLURM = "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"

# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_launcher_without_m_is_not_ignored(command: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra/launcher=submitit_slurm: .* add -m"):
        compose.compose(command, [SLURM])
    compose.compose(command, [SLURM], multirun=True)


@pytest.mark.parametrize("key", ["tasks_per_node", "nodes"])
def test_several_tasks_are_not_several_runs_in_one_folder(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra\.launcher\.{key}=2: .*backend=accelerate"):
        compose.compose("train", [SLURM, f"hydra.launcher.{key}=2"], multirun=True)


def test_a_missing_extra_and_a_typo_are_named() -> None:
    with pytest.raises(ConfigError, match=r"hydra/launcher=submitit_slrum: did you mean submitit_slurm"):
        compose.compose("train", ["hydra/launcher=submitit_slrum"], multirun=True)
    without = (
        "Could not find 'hydra/launcher/submitit_slurm'\n\nAvailable options in 'hydra/launcher':\n\tbasic\nConfig"
    )
    found = launchers.not_found(without)
    assert found is not None
    assert found.endswith("needs hydra-submitit-launcher: pip install 'vlmtune[slurm]'")


def test_a_machine_without_slurm_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = compose.compose("train", [SLURM], multirun=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch and no srun; submit from a machine of the cluster"):
        launchers.check_machine(composed)
    fake_slurm.install(tmp_path)
    launchers.check_machine(composed)


def test_tasks_of_srun_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all be rank 0, in one folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match="srun started 4 tasks"):
        World.from_environment()
    with monkeypatch.context() as launched:
        for name, number in (("RANK", "3"), ("WORLD_SIZE", "8")):  # torchrun's
            launched.setenv(name, number)
        assert World.from_environment().processes == 8
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert World.from_environment().is_alone


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "failed: exit code 143"),
        ({"status": "failed", "error": {"message": "no rows"}}, "failed: no rows"),
        ({"status": "interrupted", "error": None}, "interrupted: exit code 143; resume={} goes on with it"),
    ],
)
def test_a_trial_tells_how_it_ended(tmp_path: Path, result: dict[str, Any] | None, said: str) -> None:
    submitted.check(0, tmp_path)
    if result is not None:
        (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(TrainingError) as raised:
        submitted.check(143, tmp_path)
    assert str(raised.value) == f"{tmp_path}: {said.format(tmp_path)}"


def test_a_job_that_was_killed_is_one_error() -> None:
    """With submitit's own text, which has the end of the job's log."""
    with pytest.raises(TrainingError, match="submitit: Job 7 has not produced any output"), submitted.of_submitit():
        raise UncompletedJobError("Job 7 has not produced any output")
    with pytest.raises(RuntimeError, match="a bug"), submitted.of_submitit():
        raise RuntimeError("a bug")


# ---------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """An evaluation after every 100 steps takes seconds; a checkpoint is only written when a signal asks for it."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(40)]
    table = tiny.write_csv(folder, rows, per_image=2)

    def make(*more: str) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "adapter.lora_dropout=0.2"]
        data = ["data=csv", f"data.train={table}", f"data.validation={table}"]
        steps = ["trainer.batch_size=4", "trainer.max_steps=150", "trainer.eval_every=100", "trainer.log_every=1"]
        rest = ["trainer.eval_baseline=false", "trainer.eval_batch_size=1", "trainer.save_every=null"]
        return [*model, *data, *steps, *rest, "trainer.learning_rate=1e-2", "generation.max_new_tokens=64", *more]

    return make


@contextmanager
def started(words: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in `folder`, which is killed at the end of the block if it still runs."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    program = [sys.executable, str(home() / "src" / "train.py"), *words]
    with subprocess.Popen(program, cwd=folder, env=given, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(reached: Callable[[], Any], seconds: float = 300) -> Any:
    """Wait for something true, and return it."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def step_of(run: Path) -> int:
    """The last step that a run has logged."""
    curve = run / "metrics.jsonl"
    rows = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
    return max((row["step"] for row in rows if "train/loss" in row), default=0)


def task_of(run: Path) -> int:
    """The process that holds a run folder."""
    return int((run / ".lock").read_text().split()[1])


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def assert_equal(run: Path, straight: Path) -> None:
    assert result_of(run)["metrics"] == result_of(straight)["metrics"]
    assert_same_weights(run, straight)


@pytest.fixture(scope="module")
def straight(overrides: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    vlmtune.train(overrides(f"hydra.run.dir={run}"))
    return run


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
def test_trials_that_get_their_signal_are_requeued_and_one_that_fails_is_told(
    overrides: Callable[..., Any], straight: Path, tmp_path: Path
) -> None:
    """In a step of trial 0, and in an evaluation of trial 2; the table of trial 1 has a row without its image."""
    sweep, bad = tmp_path / "sweep", tmp_path / "bad.csv"
    bad.write_text("image_path,question,answer\ngone.png,what?,red\n")
    words = ["-m", LOCAL, f"hydra.sweep.dir={sweep}", "hydra.launcher.timeout_min=20", *overrides()]
    good = next(word for word in words if word.startswith("data.train="))
    with started([*words, f"{good},{bad},{good.partition('=')[2]}"], tmp_path) as process:
        until(lambda: 0 < step_of(sweep / "0") < 100)
        os.kill(task_of(sweep / "0"), signal.SIGUSR2)
        until(lambda: step_of(sweep / "2") == 100)
        time.sleep(0.2)
        os.kill(task_of(sweep / "2"), signal.SIGUSR2)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert f"{sweep / '1'}: failed: " in said
    assert "gone.png" in said
    assert "Traceback" not in said
    statuses = [line.split(",").count("completed") for line in (sweep / "summary.csv").read_text().splitlines()[1:]]
    assert statuses == [1, 0, 1]
    assert f"compared     {sweep / 'compare.html'}" in said
    assert "resuming from step 100 " in (sweep / "2" / "train.log").read_text()
    for trial in ("0", "2"):
        assert (sweep / trial / "train.log").read_text().count("resuming from step") == 1
        assert_equal(sweep / trial, straight)


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
def test_a_job_with_several_processes_ends_and_goes_on_as_one(overrides: Callable[..., Any], tmp_path: Path) -> None:
    """Its process passes the signal on to those that it started, and gives it to submitit once they have ended."""
    two = overrides("backend=accelerate", "backend.num_processes=2", "trainer.batch_size=2")
    vlmtune.train([*two, f"hydra.run.dir={tmp_path / 'straight'}"])
    run = tmp_path / "sweep" / "0"
    words = ["-m", LOCAL, f"hydra.sweep.dir={run.parent}", "hydra.launcher.timeout_min=20"]
    with started([*words, *two], tmp_path) as process:
        until(lambda: 0 < step_of(run) < 100)
        job = next(path.name for path in (run.parent / ".submitit").iterdir() if path.name.isdigit())
        children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGUSR2)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert (run / "train.log").read_text().count("resuming from step") == 1
    assert_equal(run, tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
def test_a_run_on_slurm_is_requeued_after_sigusr1(
    overrides: Callable[..., Any], straight: Path, tmp_path: Path
) -> None:
    """The signal that submitit waits for is the user's choice."""
    run, environment = tmp_path / "runs" / "0", fake_slurm.install(tmp_path)
    words = ["-m", SLURM, f"hydra.sweep.dir={run.parent}", "hydra.launcher.max_num_timeout=1", *overrides()]
    with started(words, tmp_path, SUBMITIT_PREEMPT_SIGNAL="USR1", **environment) as process:
        until(lambda: 0 < step_of(run) < 100)
        os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert until((tmp_path / "code").exists)
    assert (tmp_path / "code").read_text() == "0"
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
    assert (run / "train.log").read_text().count("resuming from step") == 1
    assert_equal(run, straight)


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
def test_the_batch_script_saves_before_the_time_limit_and_is_requeued(
    overrides: Callable[..., Any], tmp_path: Path
) -> None:
    """The script of the docs as it is, with torchrun and two processes."""
    run, environment = tmp_path / "run", fake_slurm.install(tmp_path)
    two = [str(run), *overrides("trainer.batch_size=2")]
    given = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    given["PATH"] = os.pathsep.join([environment["PATH"], str(Path(sys.executable).parent)])
    subprocess.run(["sbatch", str(home() / "docs" / "slurm.sbatch"), *two], cwd=home(), env=given, check=True)
    until(lambda: 0 < step_of(run) < 100)
    os.kill(int((tmp_path / "script").read_text()), signal.SIGUSR1)
    assert until((tmp_path / "code").exists), (tmp_path / "log").read_text()
    assert (tmp_path / "code").read_text() == "0", (tmp_path / "log").read_text()
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
    assert result_of(run)["status"] == "completed"
    assert (run / "train.log").read_text().count("resuming from step") == 1
