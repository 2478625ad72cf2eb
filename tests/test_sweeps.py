"""Trials of a sweep as processes: how each ends is known, the others go on, and none outlives the command."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sweep_folders
import trial_work
from vlmtune.cli import resumed, sweeps
from vlmtune.config import compose, launchers, sweep_file
from vlmtune.errors import CheckpointError, ConfigError, TrainingError
from vlmtune.launch.signals import Interrupted
from vlmtune.trials import files, running
from vlmtune.trials.devices import Devices, found
from vlmtune.trials.running import Runner, Work
from vlmtune.trials.trial import Trial


def until(reached: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := reached()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


def trials_in(folder: Path, count: int) -> list[Trial]:
    return [Trial(number, [], [], folder / str(number)) for number in range(count)]


def run(folder: Path, works: Sequence[Callable[[], int]], **settings: Any) -> list[Trial]:
    """Trials that do this, until all have ended."""
    trials = trials_in(folder, len(works))
    given = {"parallel": None, "max_minutes": None, "modules": []} | settings
    Runner(**given).run(trials, lambda trial: Work(works[trial.number]), lambda ended: None)
    return trials


def error(trial: Trial) -> dict[str, str]:
    found: dict[str, str] = json.loads((trial.folder / "result.json").read_text())["error"]
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and more than an entry that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------- how trials end


def test_each_end_has_a_type_and_the_others_go_on(tmp_path: Path) -> None:
    works = [
        partial(trial_work.die, signal.SIGKILL),
        partial(trial_work.die, signal.SIGTERM),
        partial(trial_work.leave, 3),
        partial(trial_work.complete_and_crash, tmp_path / "4"),
        partial(trial_work.complete, tmp_path / "5"),
    ]
    works.insert(3, partial(trial_work.complete, tmp_path / "3"))
    trials = run(tmp_path, works)
    assert [trial.state for trial in trials] == ["failed", "failed", "failed", "completed", "completed", "completed"]
    assert error(trials[0])["type"] == "Killed"
    assert error(trials[0])["message"].startswith("killed by SIGKILL (signal 9), most often as the machine is out of")
    assert error(trials[1])["message"] == "killed by SIGTERM (signal 15)"
    assert [error(trial)["failure"] for trial in trials[:3]] == ["killed", "killed", "other"]
    assert error(trials[2])["message"] == f"it ended with exit code 3; see {tmp_path / '2' / 'output.log'}"
    assert (tmp_path / "2" / "output.log").read_text() == "said by Python\nsaid by another program\n"
    assert [files.exit_code(trial.folder) for trial in trials] == [1, 1, 1, 0, 0, 0]
    group = json.loads((tmp_path / "3" / "result.json").read_text())["group"]
    assert group != os.getpgid(0), "a Ctrl-C on the terminal must not reach a trial twice"


def test_a_trial_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers saves, as at a scheduler's limit; one that hangs is killed, with all that it started."""
    monkeypatch.setattr(running, "PATIENCE", 1.0)
    works = [partial(trial_work.train, tmp_path / "0", 600), partial(trial_work.hang, tmp_path / "1")]
    trials = run(tmp_path, [*works, partial(trial_work.complete, tmp_path / "2")], max_minutes=0.05)
    assert [trial.state for trial in trials] == ["failed", "failed", "completed"]
    for trial in trials[:2]:
        assert error(trial)["failure"] == "time"
        assert error(trial)["message"] == "it took longer than hydra.launcher.max_minutes=0.05"
    until(lambda: not any(map(runs, pids(trials[1]))))
    os.kill(pids(trials[0])[1], signal.SIGKILL)  # a trial that ended by itself ends its own processes


def pids(trial: Trial) -> list[int]:
    return [int(word) for word in (trial.folder / "pids").read_text().split()]


def test_a_signal_ends_what_runs_after_its_step_and_nothing_else_begins(tmp_path: Path) -> None:
    trials = trials_in(tmp_path, 3)
    works = [partial(trial_work.train, trial.folder, 600) for trial in trials]

    def interrupt() -> None:
        until(lambda: all((trial.folder / "began").exists() for trial in trials[:2]))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    runner = Runner(2, None, [])
    with pytest.raises(Interrupted) as raised:
        runner.run(trials, lambda trial: Work(works[trial.number]), lambda ended: None)
    assert raised.value.number == signal.SIGINT
    assert [trial.state for trial in trials] == ["interrupted", "interrupted", "waiting"]
    assert [files.exit_code(trial.folder) for trial in trials] == [130, 130, 0]
    for trial in trials[:2]:
        os.kill(pids(trial)[1], signal.SIGKILL)


def test_a_third_signal_ends_a_trial_that_hangs(tmp_path: Path) -> None:
    [trial] = trials_in(tmp_path, 1)

    def interrupt() -> None:
        until((trial.folder / "began").exists)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        Runner(None, None, []).run([trial], lambda each: Work(partial(trial_work.hang, each.folder)), lambda _: None)
    assert trial.state == "interrupted"
    until(lambda: not any(map(runs, pids(trial))))


PROGRAM = """
import sys
from functools import partial
from pathlib import Path
import trial_work
from vlmtune.trials.running import Runner, Work
from vlmtune.trials.trial import Trial
if __name__ == "__main__":
    trials = [Trial(n, [], [], Path(sys.argv[1]) / str(n)) for n in range(2)]
    Runner(2, None, []).run(trials, lambda trial: Work(partial(trial_work.train, trial.folder, 600)), lambda _: None)
"""


def test_trials_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """As by SIGTERM: after the step, with a result."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path], env=environment) as process:
        trials = trials_in(tmp_path, 2)
        until(lambda: all((trial.folder / "began").exists() for trial in trials))
        process.kill()
    until(lambda: not any(runs(pids(trial)[0]) for trial in trials))
    assert [files.state(trial.folder) for trial in trials] == ["interrupted", "interrupted"]
    for trial in trials:
        os.kill(pids(trial)[1], signal.SIGKILL)


# ---------------------------------------------------------------- devices


def test_trials_at_once_have_devices_of_their_own() -> None:
    devices = Devices(["3", "5", "6", "7"], None)
    first, second = devices.take(2), devices.take(1)
    assert (first, second) == (["3", "5"], ["6"])
    assert devices.has_room(1)
    assert not devices.has_room(2)
    devices.give_back(first)
    assert devices.has_room(3)
    assert devices.count(None) == 4


def test_more_trials_than_gpus_share_them_evenly() -> None:
    devices = Devices(["0", "1"], 3)
    assert [devices.take(1) for _ in range(3)] == [["0"], ["1"], ["0"]]
    assert not devices.has_room(1)


def test_without_gpus_trials_run_one_after_another_unless_asked() -> None:
    devices = Devices([], None)
    assert devices.has_room(2)
    assert devices.take(2) == []
    assert not devices.has_room(1)
    assert devices.environment([], 1) == {}


def test_cores_are_divided_unless_the_user_did_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Devices([], 3).environment([], 2) == {"OMP_NUM_THREADS": "2"}
    assert Devices(["0", "1"], None).environment(["1"], 1) == {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "8"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Devices([], 2).environment([], 1) == {}


def test_a_trial_is_told_its_devices_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "found", lambda context: ["GPU-a", "GPU-b"])
    monkeypatch.delenv("OMP_NUM_THREADS")
    run(tmp_path, [partial(trial_work.complete, tmp_path / "0"), partial(trial_work.complete, tmp_path / "1")])
    told = [json.loads((tmp_path / number / "result.json").read_text())["told"] for number in ("0", "1")]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in told] == ["GPU-a", "GPU-b"]
    assert all(int(each["OMP_NUM_THREADS"]) >= 1 for each in told)


def test_gpus_are_the_ones_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        """As multiprocessing's context, where torch sees two GPUs."""

        def Pipe(self, duplex: bool) -> Any:
            return self, self

        def Process(self, **_: Any) -> Any:
            return self

        def start(self) -> None: ...
        def close(self) -> None: ...
        def join(self) -> None: ...
        def recv(self) -> int:
            return 2

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,9")
    assert found(Told()) == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert found(Told()) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert found(None) == []


def test_a_process_that_can_not_be_started_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        """As multiprocessing's context, where a process ends before it does anything."""

        Pipe = staticmethod(multiprocessing.Pipe)

        def Process(self, **_: Any) -> Any:
            return multiprocessing.get_context("spawn").Process(target=os._exit, args=(1,))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(TrainingError, match="that trials are started from has ended"):
        found(Dying())


# ---------------------------------------------------------------- names, and what goes on


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "trials"),
        (["sweeps=lora_rank"], "lora_rank"),
        (
            ["adapter.r=4,8", "trainer.learning_rate=1e-4,2e-4", "trainer.max_steps=3"],
            "adapter.r,trainer.learning_rate",
        ),
    ],
)
def test_a_sweeps_folder_bears_its_name(words: list[str], name: str) -> None:
    composed = compose.compose("train", [word for word in words if word.startswith("sweeps=")], multirun=True)
    composed.hydra.overrides.task = words  # Hydra's own multirun keeps the values that a composition can't have
    assert Path(composed.hydra.sweep.dir).parts[-2] == name


def test_what_is_swept_is_known_from_the_words() -> None:
    words = ["++adapter.r=4,8", "++trainer.seed=range(3)", "++model.path='a,b'", "adapter=lora,dora"]
    assert sweeps.swept_keys(words, {"optimizer.beta1": "interval(0.8, 0.99)", "trainer.epochs": 2}) == [
        "optimizer.beta1",
        "adapter.r",
        "trainer.seed",
        "adapter",
    ]


@pytest.mark.parametrize(
    ("status", "failure", "retry", "expected"),
    [
        (None, None, False, "waiting"),
        ("completed", None, True, "completed"),
        ("preflight", None, False, "completed"),
        ("interrupted", None, False, "waiting"),
        ("failed", "killed", False, "waiting"),
        ("failed", "time", False, "failed"),
        ("failed", "config", False, "failed"),
        ("failed", "config", True, "waiting"),
    ],
)
def test_what_a_resumed_sweep_runs(
    tmp_path: Path, status: str | None, failure: str | None, retry: bool, expected: str
) -> None:
    if status is not None:
        trial_work.result(tmp_path, status, error=failure and {"failure": failure})
    assert files.state_before(tmp_path, retry_failed=retry) == expected


def test_a_resumed_sweep_goes_on_as_it_was_started(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    trial = Trial(0, ["adapter.r=4"], ["adapter.r=4"], sweep / "0")
    files.write(
        sweep, "adapter.r", "exact_match", ["adapter.r=4,8", "hydra.launcher.parallel=2"], [files.describe(trial)]
    )
    words = [f"resume={sweep}", "hydra.launcher.parallel=3", "hydra.launcher.retry_failed=true"]
    assert resumed.of_sweep(words) == [
        "adapter.r=4,8",
        *words[1:],
        "resume=auto",
        f'hydra.sweep.dir="{sweep}"',
    ]
    with pytest.raises(ConfigError, match=r"adapter\.r=16: a sweep goes on as it was started"):
        resumed.of_sweep([*words, "adapter.r=16"])
    with pytest.raises(ConfigError, match=f"-m resume={sweep}"):
        files.check_free(sweep, resumed=False)
    files.check_free(sweep, resumed=True)
    with pytest.raises(CheckpointError, match=rf"is not a sweep \(it has no sweep.json\); sweeps in .*: {sweep.name}"):
        resumed.of_sweep([f"resume={sweep.parent / 'other'}"])


def test_a_damaged_record_of_a_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / sweep_file.FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"sweep\.json: is damaged"):
        resumed.of_sweep([f"resume={tmp_path}"])


@pytest.mark.parametrize(
    ("words", "multirun", "problem"),
    [
        (["hydra.launcher.parallel=2"], False, r"hydra\.launcher\.parallel: is for a sweep; add -m"),
        (["hydra.launcher.parallel=0"], True, "must be at least 1, or null"),
        (["hydra.launcher.max_minutes=0"], True, "must be above 0, or null"),
        (["hydra.launcher.max_minutes=nan"], True, "must be above 0, or null"),
        (["hydra.sweep.subdir=mine"], True, r"hydra\.sweep\.subdir=mine: a trial's folder is its number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(words: list[str], multirun: bool, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose.compose("train", words, multirun=multirun)


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("hydra.launcher.parallell=2", r"hydra\.launcher\.parallell: no such key; did you mean parallel\?"),
        ("hydra.sweeper.n_trails=2", r"hydra\.sweeper\.n_trails: no such key; did you mean n_trials\?"),
        ("hydra.lanucher.parallel=2", r"hydra\.lanucher: no such key; did you mean launcher\?"),
    ],
)
def test_a_typo_in_hydras_own_keys_names_the_right_one(word: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose.compose("train", ["hydra/sweeper=optuna", word], multirun=True)


def test_a_single_run_and_other_launchers_are_as_they_were() -> None:
    assert launchers.is_own(compose.compose("train", []))
    for other in ("basic", "submitit_local"):
        assert not launchers.is_own(compose.compose("train", [f"hydra/launcher={other}"], multirun=True))
    assert compose.compose("predict", [], multirun=True).hydra.runtime.choices["hydra/launcher"] == "basic"


def test_the_trials_of_another_launcher_are_found_in_their_folders(tmp_path: Path) -> None:
    words = ["hydra/launcher=basic", "trainer.seed=0", "tracker=none", f"hydra.sweep.dir={tmp_path}"]
    composed = compose.compose("train", words, multirun=True)
    composed.hydra.overrides.task.insert(0, "adapter.r=2,4")
    with sweeps.Elsewhere.finishing:
        sweeps.Elsewhere().on_multirun_start(composed)
        assert sweep_file.read(tmp_path)["trials"] == []
        for trial in (sweep_folders.trial(tmp_path, number) for number in (2, 0)):
            sweep_folders.end(trial, metrics={"eval/exact_match": 0.5})
            (trial.folder / ".hydra").mkdir()
            (trial.folder / ".hydra" / "overrides.yaml").write_text(f"- adapter.r={trial.number}\n- trainer.seed=0\n")
        (tmp_path / "notes").mkdir()
    found = sweep_file.read(tmp_path)
    assert found["overrides"] == ["adapter.r=2,4", "trainer.seed=0", "tracker=none", "hydra/launcher=basic"]
    assert [trial["number"] for trial in found["trials"]] == [0, 2]
    assert found["trials"][1] == {"number": 2, "overrides": ["adapter.r=2", "trainer.seed=0"], "swept": ["adapter.r=2"]}
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], row["status"]) for row in rows] == [("0", "completed"), ("2", "completed")]
