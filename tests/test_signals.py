"""A signal ends a run after its step, and then goes to the handler that was there before, which may requeue the job."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
import vlmtune
from runs import assert_same_weights
from vlmtune.errors import ConfigError
from vlmtune.evaluation import answering
from vlmtune.launch import scheduler, signals
from vlmtune.training import loop

USR1, USR2, TERM = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


# ---------------------------------------------------------------- who gets it, and when


def test_a_signal_is_handed_on_when_the_outermost_block_is_left() -> None:
    came: list[int] = []
    with handled(USR1, lambda number, frame: came.append(number)):
        mine = signal.getsignal(USR1)
        with signals.ending_at_once():
            request = signals.StopRequest()
            with request.watching():
                send(USR1)
            assert (request.signal, came) == (USR1, [])
        assert came == [USR1]
        assert signal.getsignal(USR1) is mine


def test_one_that_ends_at_once_is_handed_on_too() -> None:
    came: list[int] = []
    with (
        handled(USR2, lambda number, frame: came.append(number)),
        pytest.raises(signals.Interrupted, match="SIGUSR2"),
        signals.ending_at_once(),
    ):
        send(USR2)
    assert came == [USR2]


def test_a_time_limits_second_signal_ends_nothing_and_both_are_handed_on() -> None:
    """SLURM announces the time limit by one signal, and sends SIGTERM when it is reached."""
    came: list[int] = []
    note = lambda number, frame: came.append(number)  # noqa: E731
    with handled(USR2, note), handled(TERM, note), signals.ending_at_once():
        request = signals.StopRequest()
        with request.watching():
            send(USR2, TERM)
        assert request.signal == USR2
    assert came == [USR2, TERM]


@pytest.mark.parametrize("second", [TERM, signal.SIGINT])
def test_the_same_signal_again_or_ctrl_c_ends_at_once(second: int) -> None:
    with (
        handled(TERM, lambda number, frame: None),
        pytest.raises(signals.Interrupted, match=signal.Signals(second).name),
        signals.ending_at_once(),
        signals.StopRequest().watching(),
    ):
        send(TERM, second)


def test_an_ignored_signal_stays_ignored() -> None:
    with handled(USR1, signal.SIG_IGN), signals.ending_at_once():
        assert signal.getsignal(USR1) is signal.SIG_IGN
        send(USR1)


# ---------------------------------------------------------------- a job that is started again


@pytest.mark.parametrize(
    ("environment", "name", "again"),
    [
        ({}, None, False),
        ({"SUBMITIT_LOCAL_JOB_ID": "7"}, "submitit 7", True),
        ({"SUBMITIT_LOCAL_JOB_ID": "7", "SLURM_JOB_ID": "3"}, "submitit 7", True),
        ({"SLURM_JOB_ID": "3"}, "slurm 3", False),
        ({"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "0"}, "slurm 3", False),
        ({"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "2"}, "slurm 3", True),
    ],
)
def test_a_restart_is_known_by_the_job_and_its_count(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str | None, again: bool
) -> None:
    for variable in ("SUBMITIT_LOCAL_JOB_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert scheduler.job() == name
    assert scheduler.is_restart_of(name) == again
    assert not scheduler.is_restart_of("slurm 4")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """22 rows in steps of 4, with dropout."""
    folder = tmp_path_factory.mktemp("signals")
    table = tiny.write_csv(folder, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(22)], per_image=2)

    def make(run: Path, *more: str) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "adapter.lora_dropout=0.2"]
        data = ["data=csv", f"data.train={table}", f"data.validation={table}", "data.max_eval_rows=3"]
        steps = ["trainer.batch_size=4", "trainer.max_steps=7", "trainer.eval_every=3", "trainer.eval_baseline=false"]
        rest = ["trainer.learning_rate=1e-2", "generation.max_new_tokens=2", "trainer.save_every=null"]
        return [*model, *data, *steps, *rest, f"hydra.run.dir={run}", *more]

    return make


@pytest.fixture(scope="module")
def straight(overrides: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    vlmtune.train(overrides(folder))
    return folder


def requeue(number: int, frame: Any) -> None:
    """As submitit's."""
    raise SystemExit(144)


@pytest.mark.parametrize(("owner", "name", "step"), [(loop, "_update", 5), (answering, "logits_in_pieces", 3)])
def test_a_requeued_job_goes_on_with_its_own_run(
    overrides: Callable[..., Any],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    step: int,
) -> None:
    """SIGUSR1 comes in the fifth step, or in the evaluation after the third; nobody says resume=auto."""
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    calls, real = [0], getattr(owner, name)

    def sending(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == (5 if owner is loop else 1):
            send(USR1)
        return real(*arguments, **options)

    run = tmp_path / "run"
    monkeypatch.setattr(owner, name, sending)
    with handled(USR1, requeue), pytest.raises(SystemExit):
        vlmtune.train(overrides(run))
    monkeypatch.setattr(owner, name, real)
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["signal"], result["steps"]) == ("interrupted", USR1, step)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:06d}"]

    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "8")
    with pytest.raises(ConfigError, match="holds a run already"):
        vlmtune.train(overrides(run))
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    resumed = vlmtune.train(overrides(run))
    assert resumed["metrics"] == json.loads((straight / "result.json").read_text())["metrics"]
    assert_same_weights(run, straight)

    assert vlmtune.train(overrides(run))["status"] == "completed", "started once more, nothing is left to do"
    assert "this run is complete" in (run / "train.log").read_text()
