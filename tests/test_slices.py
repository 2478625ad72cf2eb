"""Metrics by kinds of rows (task.slices)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vlmtune.config.schema import Config, DataConfig, TaskConfig
from vlmtune.data import table
from vlmtune.data.splits import Split
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.evaluate import Evaluation
from vlmtune.metrics import resolve, score
from vlmtune.record import slices

ROWS = [
    # image, question, answer, place, prediction
    ("small.png", "What color is it?", "red", "north", "red"),
    ("small.png", "What color is this?", "dark blue", "north", "blue"),
    ("wide.png", "How many are there?", "a very long answer of eight words", "", "a very long answer"),
    ("wide.png", "Describe", "a dog", "south", "a cat"),
]
METRICS = ["exact_match", "cider_d", "cer", "bleu_4"]


def case(folder: Path, *wanted: str) -> tuple[Split, Evaluation, Config]:
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    Image.new("RGB", (800, 400)).save(folder / "wide.png")
    frame = pd.DataFrame([row[:4] for row in ROWS], columns=["image_path", "question", "answer", "place"])
    frame.to_csv(folder / "rows.csv", index=False)
    task = TaskConfig(metrics=METRICS, slices=list(wanted))
    config = Config(data=DataConfig(test=str(folder / "rows.csv")), task=task)
    split = table.load(config.data, config.task, 0, ("test",))["test"]
    predictions = [row[4] for row in ROWS]
    means, rows = score(resolve(METRICS), predictions, [record.answers for record in split.records])
    return split, Evaluation({"loss": 1.0, **means}, predictions, rows), config


def test_slices_add_up_to_the_whole(tmp_path: Path) -> None:
    split, found, config = case(tmp_path, "place", *slices.KINDS)
    made = slices.sliced(split, found, config)
    assert made["place"].keys() == {"north", "(empty)", "south"}
    assert made["question_kind"].keys() == {"what color", "how many", "describe"}
    assert made["image_size"].keys() == {"below 0.1", "0.1 to 0.5"}
    assert made["answer_length"].keys() == {"1 word or less", "2 or 3 words", "4 to 10 words"}
    for values in made.values():
        assert sum(each["rows"] for each in values.values()) == len(ROWS)
        for metric in ("exact_match", "cider_d"):
            total = sum(each["rows"] * each[metric] for each in values.values())
            assert total / len(ROWS) == pytest.approx(found.metrics[metric])
    weights = {"north": 12, "(empty)": 33, "south": 5}  # characters of the references
    errors = sum(made["place"][value]["cer"] * count for value, count in weights.items())
    assert errors / sum(weights.values()) == pytest.approx(found.metrics["cer"])
    assert made["place"]["north"]["exact_match"] == 0.5
    assert [f"by {name}" in text for name, text in zip(made, slices.tables(made), strict=True)] == [True] * 4


def test_rare_values_are_one_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MOST", 1)
    made = slices.sliced(*case(tmp_path, "place"))
    assert {value: each["rows"] for value, each in made["place"].items()} == {"north": 2, "other": 2}


def test_a_slice_that_is_no_column_is_an_error_with_candidates(tmp_path: Path) -> None:
    split, _, config = case(tmp_path, "plaec", "image_size", "place", "lenght")
    with pytest.raises(ConfigError) as caught:
        slices.check(split, config)
    first, second = caught.value.problems
    assert "no column plaec; did you mean place?" in first
    assert "no column lenght" in second


def test_answers_that_a_metric_can_t_score_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    case(tmp_path)
    task = TaskConfig(metrics=["box_f1"])
    with pytest.raises(DataError, match=r"row 1: box_f1 can't score the answer: 'red' names no box"):
        table.load(DataConfig(test=str(tmp_path / "rows.csv")), task, 0, ("test",))
