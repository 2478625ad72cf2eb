"""A metric of which less is better: everything that ranks or chooses follows it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import compared
import sweep_folders
from vlmtune.comparison.ranking import compare
from vlmtune.config import sweepers
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import RecordList, Split
from vlmtune.metrics import averaged, lower_is_better
from vlmtune.metrics.statistics import mean_intervals
from vlmtune.record import report, runfolder
from vlmtune.training.best import Best
from vlmtune.trials.overview import Overview


def seconds_off(prediction: str, references: list[str]) -> float:
    return abs(float(prediction) - float(references[0]))


seconds_off.lower_is_better = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("loss", True), ("eval/loss", True), ("eval/cer", True), ("wer", True), ("cider_d", False)],
        *[("exact_match", False), ("memory", False), ("test_lower_is_better.seconds_off", True)],
    ],
)
def test_the_direction_of_a_metric(name: str, expected: bool) -> None:
    assert lower_is_better(name) is expected


class Around:
    """What `Best` needs of a run, with evaluations that are given."""

    def __init__(self, metric: str, values: list[float]):
        self.values, self.saved = iter(values), list[int]()
        self.metric = metric
        trainer: Any = type("", (), {"best_metric": f"eval/{metric}", "early_stopping_patience": 2})()
        self.run = type("", (), {"config": type("", (), {"trainer": trainer})()})()
        self.progress: Any = type("", (), {"step": 0, "best": None, "best_step": None, "since_best": 0})()

    def evaluate(self, title: str) -> Any:
        self.progress.step += 1
        return type("", (), {"metrics": {self.metric: next(self.values)}})()

    def save(self) -> None:
        self.saved.append(self.progress.step)


@pytest.mark.parametrize(("metric", "saved"), [("cer", [1, 3]), ("exact_match", [1, 2])])
def test_the_best_checkpoint_and_early_stopping(metric: str, saved: list[int]) -> None:
    around: Any = Around(metric, [0.5, 0.7, 0.4, 0.6, 0.6])
    best = Best(around, around)
    for _ in range(5):
        best.evaluate()
    assert around.saved == saved
    assert best.exhausted


def test_the_best_trial_on_the_screen(tmp_path: Path) -> None:
    trials = [sweep_folders.trial(tmp_path, number) for number in range(3)]
    for trial, value in zip(trials, (0.5, 0.2, 0.9), strict=True):
        sweep_folders.end(trial, metrics={"eval/cer": value, "eval/anls": value})
    for metric, number in (("cer", 1), ("anls", 2)):
        seen = Overview(trials, metric)
        seen.read()
        assert seen.best is seen.watched[number]


def test_the_direction_of_a_search() -> None:
    given = sweepers.Optuna(objectives=["eval/cer", "eval/anls", "seconds"])
    assert sweepers.directions(given, "anls") == ["minimize", "maximize", "minimize"]
    assert sweepers.directions(sweepers.Optuna(), "cer") == ["minimize"]
    assert sweepers.directions(sweepers.Optuna(), "anls") == ["maximize"]


def test_runs_are_ranked_by_the_fewest_errors(tmp_path: Path) -> None:
    table = compared.write_table(tmp_path, images=60, rows=2)
    for name, share in (("bad", 0.2), ("good", 0.9)):
        compared.write_run(tmp_path / name, table, compared.answered(60, 2, share, seed=1))
    found = compare([tmp_path / "bad", tmp_path / "good"], metric="cer")
    assert [entry.name for entry in found.entries] == ["good", "bad"]
    good, bad = (entry.scores["cer"] for entry in found.entries)
    assert good.mean < bad.mean
    assert (bad.difference > 0, bad.verdict) == (True, "worse")
    assert "biased downward" in found.notes[0]


def test_rows_have_a_score_of_each_metric_and_the_page_knows_which_are_right(tmp_path: Path) -> None:
    records = [Record((Turn("what?", (answer,)),)) for answer in ("red", "blue")]
    scores = [{"cer": 0.0, "exact_match": 1.0}, {"cer": 1.0, "exact_match": 0.0}]
    found: Any = type("", (), {"predictions": ["red", "grey"], "scores": scores})()
    runfolder.write_predictions(tmp_path / "predictions.csv", Split(RecordList(records)), found, ["cer", "exact_match"])
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["answer_predictions"], float(row["score"]), float(row["score_exact_match"])) for row in rows] == [
        ("red", 0.0, 1.0),
        ("grey", 1.0, 0.0),
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": {"metrics": ["cer", "exact_match"]}}))
    for direction, right in (("minimized", 0), ("maximized", 1)):
        result = json.loads(json.dumps({"objective_is": direction, "metrics": {}}))
        ends = report._ends((tmp_path / "config.yaml").read_text(), result)
        assert [report._verdict(row, *ends) for row in rows][right] == "right"


def test_only_means_have_an_interval_of_a_mean() -> None:
    """The value of all rows of an error rate is no mean of theirs: it could lie outside of such an interval."""
    names = ["exact_match", "cer", "cider_d", "bleu_4"]
    assert averaged(names) == ["exact_match", "cider_d"]
    scores = [dict.fromkeys(names, value) for value in (0.0, 1.0, 1.0, 0.0)]
    assert list(mean_intervals(scores, averaged(names), [0, 1, 2, 3])) == ["exact_match", "cider_d"]
    assert mean_intervals(scores, [], [0, 1, 2, 3]) == {}
