"""A finished run stays finished, a signal interrupts in any phase, and what the system refuses is one sentence."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import vlmtune
import wandb_offline
from grids import thinned
from runs import words
from vlmtune import display
from vlmtune.batching.loader import _Items
from vlmtune.config.schema import TrackerConfig
from vlmtune.errors import StorageError, storage_advice
from vlmtune.evaluation import answering
from vlmtune.launch import session, surroundings
from vlmtune.launch.signals import Interrupted
from vlmtune.memory import memory_advice
from vlmtune.record import report, runfolder, tracking
from vlmtune.record.wandb_tracker import WandB

Overrides = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_outer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_"))]
    for name in {*given} - {surroundings.SERVICE}:  # or it would be put back when W&B has another service
        monkeypatch.delenv(name)


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Overrides:
    table = tiny.write_csv(tmp_path, [(f"number {i}?", ("red", "blue")[i % 2]) for i in range(12)], per_image=3)

    def make(*more: str, name: str = "run") -> list[str]:
        return [
            *words(checkpoint_of("qwen2_vl"), table),
            f"data.validation={table}",
            "trainer.max_steps=2",
            "trainer.batch_size=4",
            "trainer.eval_batch_size=4",
            "trainer.eval_baseline=false",
            "generation.max_new_tokens=2",
            f"hydra.run.dir={tmp_path / name}",
            *more,
        ]

    return make


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------- the end stands


def test_what_fails_behind_the_result_is_a_warning(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three, and none keeps the next from being tried."""

    def failing(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Failing(tracking.NoTracker):
        finish = failing

    monkeypatch.setattr(tracking, "build", lambda *_, **__: Failing())
    monkeypatch.setattr(report, "write", failing)
    monkeypatch.setattr(runfolder, "write_predictions", failing)
    result = vlmtune.train(overrides())
    assert result["status"] == result_of(tmp_path / "run")["status"] == "completed"
    assert result_of(tmp_path / "run")["metrics"] == result["metrics"]
    assert (tmp_path / "run" / "train.log").read_text().count("the result is not affected: OSError") == 3


def test_a_signal_while_the_result_is_written_comes_too_late(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert vlmtune.train(overrides())["status"] == "completed"
    assert result_of(tmp_path / "run")["status"] == "completed"


# ---------------------------------------------------------------- signals


def signal_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, call: int = 1) -> None:
    """Send `number` to this process at the given call of `owner.name`."""
    calls, real = [0], getattr(owner, name)

    def sending(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, sending)


@pytest.mark.parametrize("number", thinned([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], 1))
def test_a_signal_while_the_model_loads_interrupts_and_the_run_can_be_started_again(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with monkeypatch.context() as patch:
        signal_in(patch, session, "dtypes", number)
        with pytest.raises(Interrupted):
            vlmtune.train(overrides())
    result = result_of(tmp_path / "run")
    assert (result["status"], result["signal"], result["steps"]) == ("interrupted", number, 0)
    assert vlmtune.train(overrides())["status"] == "completed"


def test_a_signal_in_the_first_evaluation_interrupts_and_is_told_to_wandb(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in(monkeypatch, answering, "logits_in_pieces", signal.SIGTERM)
    with pytest.raises(Interrupted):
        vlmtune.train(overrides("trainer.eval_baseline=true", "tracker=wandb"))
    assert result_of(tmp_path / "run")["status"] == "interrupted"
    assert wandb_offline.read(tmp_path / "run")["exit_code"] == 1


@pytest.mark.slow
def test_a_signal_in_an_evaluation_between_steps_saves_at_once(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = vlmtune.train(overrides("trainer.eval_every=1", name="straight"))
    with monkeypatch.context() as patch:
        signal_in(patch, answering, "logits_in_pieces", signal.SIGTERM)
        stopped = vlmtune.train(overrides("trainer.eval_every=1"))
    assert (stopped["status"], stopped["steps"], stopped["signal"]) == ("interrupted", 1, signal.SIGTERM)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    resumed = vlmtune.train([f"resume={tmp_path / 'run'}"])
    assert (resumed["status"], resumed["metrics"]) == ("completed", straight["metrics"])


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_leaves_the_model_and_can_be_gone_on_with(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_in(patch, answering, "logits_in_pieces", signal.SIGTERM, call=2)
        stopped = vlmtune.train(overrides())
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 2)
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
    resumed = vlmtune.train([f"resume={tmp_path / 'run'}"])
    assert resumed["status"] == "completed"
    assert "eval/loss" in resumed["metrics"]


# ---------------------------------------------------------------- W&B


def wandb_reads_again() -> None:
    """W&B reads its variables once a process."""
    import wandb

    wandb.teardown()


def test_wandbs_variables_win_over_our_defaults_and_lose_to_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PROJECT": "theirs",
        "NAME": "a name",
        "RUN_GROUP": "a group",
        "RUN_ID": "abc",
        "TAGS": "x",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb_reads_again()
    tracker = WandB(None, "offline", {}, tmp_path / "default")
    run = tracker.run
    assert (run.project, run.name, run.group, run.id, run.tags) == ("theirs", "a name", "a group", "abc", ("x",))
    tracker.finish({})
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb_reads_again()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    tracker = WandB("typed", "offline", {}, tmp_path / "typed")
    assert tracker.run.project == "typed"
    assert Path(tracker.run.dir).is_relative_to(tmp_path / "elsewhere")
    tracker.finish({})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(tracking.build(TrackerConfig(), {}, tmp_path), tracking.NoTracker)
    typed = tracking.build(TrackerConfig(mode="offline"), {}, tmp_path / "mode")
    assert not isinstance(typed, tracking.NoTracker)
    typed.finish({})


@pytest.mark.parametrize("during", [None, "another"])
def test_the_address_of_a_service_that_is_gone_is_not_put_back(
    during: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or no later run of this process, and none that it starts, could begin with W&B."""
    monkeypatch.setenv(surroundings.SERVICE, "gone")
    with surroundings.kept():
        monkeypatch.delenv(surroundings.SERVICE)
        if during:
            monkeypatch.setenv(surroundings.SERVICE, during)
    assert os.environ.get(surroundings.SERVICE) == during


def test_a_resume_is_one_run_in_wandb_and_a_new_start_another(tmp_path: Path) -> None:
    ids = []
    for resumed in (False, True, False):
        tracker = WandB(None, "offline", {}, tmp_path, resumed)
        tracker.log({"train/loss": 1.0}, 3)
        ids.append(tracker.run.id)
        tracker.finish({})
    assert ids[0] == ids[1] != ids[2]


# ---------------------------------------------------------------- Accelerate


@pytest.mark.slow
def test_settings_of_accelerate_change_nothing_and_are_said(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"GRADIENT_ACCUMULATION_STEPS": "3", "MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "inductor"}
    plain = vlmtune.train(overrides(name="plain"))
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    found = vlmtune.train(overrides())
    assert found["metrics"] == plain["metrics"]
    for name, value in settings.items():
        assert f"ACCELERATE_{name}={value}" in (tmp_path / "run" / "train.log").read_text()
        assert os.environ[f"ACCELERATE_{name}"] == value


@pytest.mark.parametrize("name", ["USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM"])
def test_another_way_to_train_is_refused(overrides: Overrides, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(vlmtune.ConfigError, match=f"ACCELERATE_{name}=true.*sharding=fsdp"):
        vlmtune.train(overrides())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOTDIR])
def test_a_refusal_of_the_system_is_one_sentence(code: int) -> None:
    with pytest.raises(StorageError, match="place"), storage_advice():
        raise OSError(code, os.strerror(code), "place")


def test_a_missing_file_may_be_a_fault_of_ours_and_stays() -> None:
    with pytest.raises(FileNotFoundError), storage_advice():
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 12 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory"),
    ],
)
def test_running_out_of_memory_is_advice(error: Exception) -> None:
    with pytest.raises(vlmtune.TrainingError, match="memory"), memory_advice():
        raise error


def test_an_error_in_a_process_that_prepares_batches_is_that_error() -> None:
    class Failing:
        def make(self, step: int, number: int) -> Any:
            raise vlmtune.DataError(["rows.csv line 3: gone", "rows.csv line 4: gone"])

    import torch

    loader = torch.utils.data.DataLoader(_Items(Failing()), batch_size=None, sampler=[(0, 0)], num_workers=1)  # type: ignore[arg-type]
    (error,) = loader
    assert isinstance(error, vlmtune.DataError)
    assert error.problems == ["rows.csv line 3: gone", "rows.csv line 4: gone"]


def test_a_log_that_the_disk_refuses_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from vlmtune import display\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with display.logging_to(Path(sys.argv[1])):\n"
        "    for number in range(9): display.log.info('line %d of some length', number)\n"
    )
    source = str(Path(display.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("can't be written") == 1
    assert "line 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "train.log").stat().st_size <= 100
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


def test_the_error_that_ends_a_run_is_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(vlmtune.DataError), display.logging_to(tmp_path):
        raise vlmtune.DataError("rows.csv: gone")
    text = (tmp_path / "train.log").read_text()
    assert "ERROR DataError: rows.csv: gone" in text
    assert "Traceback" not in text


def test_lines_that_nobody_reads_are_dropped() -> None:
    lines = "[display.log.warning('x' * 9999) for _ in range(99)]"
    code = f"from vlmtune import display\nwith display.logging_to(None): {lines}"
    source = str(Path(display.__file__).parents[1])
    command = f'{sys.executable} -c "$CODE" 2>&1 | head -c 1; echo ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": source, "CODE": code}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "x0\n"
