"""A search with Optuna: its space, its study, and how it goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import vlmtune.cli.main  # noqa: F401  # registers the resolver of a sweep's name
from vlmtune.config import compose
from vlmtune.errors import ConfigError
from vlmtune.record import runfolder
from vlmtune.trials import search, space

RATE = "trainer.learning_rate=tag(log,interval(1e-5,1e-2))"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("interval(0,1.0)", FloatDistribution(0, 1)),
        ("interval(1,8)", FloatDistribution(1, 8)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("range(1,9,2)", IntDistribution(1, 7, step=2)),
        ("range(0,1,0.5)", CategoricalDistribution(["0.0", "0.5"])),
        ("choice(4,8)", CategoricalDistribution(["4", "8"])),
        ("[q_proj],[q_proj,v_proj]", CategoricalDistribution(["[q_proj]", "[q_proj,v_proj]"])),
    ],
)
def test_hydras_grammar_is_optunas_space(text: str, wanted: Any) -> None:
    assert space.distribution(OverridesParser.create().parse_override(f"a={text}")) == wanted


def test_a_key_of_the_command_line_takes_the_place_of_the_sweeps_own() -> None:
    found, fixed = space.split({"adapter.r": "4,8", "trainer.seed": "0,1"}, ["++adapter.r=16", "model=pico"])
    assert list(found) == ["++trainer.seed"]
    assert fixed == ["++adapter.r=16", "model=pico"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "nothing to search"),
        (["trainer.learning_rate=interval(1,0.5)"], "trainer.learning_rate=interval(1,0.5): "),
        (["trainer.learning_rate=tag(log,interval(0,1.0))"], "trainer.learning_rate=tag(log"),
    ],
)
def test_what_can_not_be_searched_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space.split(None, words)
    assert caught.value.problems[0].startswith(problem) or problem in caught.value.problems[0]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("hydra.sweeper.n_trials=0", "must be at least 1"),
        ("hydra.sweeper.sampler=tpee", "did you mean tpe?"),
        ("hydra.sweeper.objectives=[exact_match]", "eval/exact_match"),
        ("hydra.sweeper.direction=[minimize,maximize]", "2 for 1 objectives"),
        ("hydra.sweeper.storage='sqlite:///x.db'", "needs a name for each study"),
    ],
)
def test_wrong_settings_are_refused(word: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper") as caught:
        compose.read("train", ["hydra/sweeper=optuna", word], multirun=True)
    assert problem in str(caught.value)


# ---------------------------------------------------------------- the search itself


class Killed(BaseException):
    """What stands for SIGKILL in one process: nothing after it is done."""


def finished(folder: Path, loss: float | None, seconds: float = 1.0) -> None:
    """Write what a run leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "status": "failed" if loss is None else "completed",
        "objective": None if loss is None else -loss,
        "metrics": {"eval/loss": loss},
        "memory": {"peak_device_bytes": 0, "peak_rss_bytes": 1000},
        "speed": {"training_seconds": seconds},
    }
    runfolder.write_json(folder / "result.json", result)


def launcher(folder: Path, *, die_at: int | None = None, fail_at: Sequence[int] = ()) -> Callable[..., Any]:
    """Runs a parabola in place of a training: done at once, best at a rate of 1e-3."""

    def launch(overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        for number, words in enumerate(overrides, initial_job_idx):
            if number == die_at:
                raise Killed
            given = dict(word.lstrip("+").split("=", 1) for word in words)
            loss = (float(given["trainer.learning_rate"]) - 1e-3) ** 2
            finished(folder / str(number), None if number in fail_at else loss, seconds=float(given["adapter.r"]))

    return launch


def config(folder: Path, *words: str) -> Any:
    chosen = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", f"hydra.sweep.dir={folder}"]
    return compose.compose("train", [*chosen, "hydra.launcher.parallel=1", *words], multirun=True)


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")


WORDS = [f"++{RATE}", "++adapter.r=choice(4,8)"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_killed_search_goes_on_with_the_same_study(tmp_path: Path, sampler: str) -> None:
    """It proposes what it would have proposed, and does no trial twice."""
    own = f"hydra.sweeper.sampler={sampler}"
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    search.search(config(straight, own), WORDS, launcher(straight))
    with pytest.raises(Killed):
        search.search(config(cut, own), WORDS, launcher(cut, die_at=5))
    assert [trial.state for trial in study(cut).trials].count(TrialState.RUNNING) == 1
    begun: list[int] = []
    rest = launcher(cut)

    def noting(overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        begun.append(initial_job_idx)
        rest(overrides, initial_job_idx)

    search.search(config(cut, own), WORDS, noting)
    assert begun == [5, 6, 7]
    assert [trial.state for trial in study(cut).trials] == [TrialState.COMPLETE] * 8
    assert [trial.params for trial in study(cut).trials] == [trial.params for trial in study(straight).trials]


def test_a_failed_trial_does_not_end_the_search_and_is_repeated_if_asked_for(tmp_path: Path) -> None:
    search.search(config(tmp_path), WORDS, launcher(tmp_path, fail_at=[2, 3]))
    trials = study(tmp_path).trials
    assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == [2, 3]
    assert len(trials) == 8
    search.search(config(tmp_path), WORDS, launcher(tmp_path))
    assert len(study(tmp_path).trials) == 8
    for _ in range(2):  # once repeated, they are not repeated again
        search.search(config(tmp_path, "hydra.launcher.retry_failed=true"), WORDS, launcher(tmp_path))
        again = study(tmp_path).trials[8:]
        assert [trial.params for trial in again] == [trials[2].params, trials[3].params]
        assert {trial.state for trial in again} == {TrialState.COMPLETE}


def test_the_best_trial_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search.search(config(tmp_path), WORDS, launcher(tmp_path))
    found = yaml.safe_load((tmp_path / search.RESULTS).read_text())
    losses = [json.loads((tmp_path / f"{n}/result.json").read_text())["metrics"]["eval/loss"] for n in range(8)]
    assert found["best_trial"] == losses.index(min(losses))
    assert found["best_value"] == -min(losses)
    assert set(found["best_params"]) == {"trainer.learning_rate", "adapter.r"}
    assert "search: 8 trials; best:" in capsys.readouterr().err


def test_several_objectives_end_in_those_that_no_other_one_beats(tmp_path: Path) -> None:
    search.search(config(tmp_path, "hydra.sweeper.objectives=[eval/loss,seconds]"), WORDS, launcher(tmp_path))
    assert [each.name for each in study(tmp_path).directions] == ["MINIMIZE", "MINIMIZE"]
    found = yaml.safe_load((tmp_path / search.RESULTS).read_text())["solutions"]
    assert found
    for one in found:
        assert not any(all(a < b for a, b in zip(o["values"], one["values"], strict=True)) for o in found)


def test_as_many_trials_as_run_at_once_are_asked_for_together(tmp_path: Path) -> None:
    sizes = []
    run = launcher(tmp_path)

    def noting(overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        sizes.append(len(overrides))
        run(overrides, initial_job_idx)

    search.search(config(tmp_path, "hydra.launcher.parallel=3"), WORDS, noting)
    assert sizes == [3, 3, 2]
