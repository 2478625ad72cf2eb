"""Run folders as a finished run leaves them, for tests of what compares them: no model is trained."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml
from PIL import Image

from vlmtune.config import compose
from vlmtune.config.schema import plain

COLOURS = ("red", "green", "blue")


def write_table(folder: Path, images: int, rows: int) -> Path:
    """A table of `rows` questions about each of `images` pictures, with the pictures beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(images):
        colour = COLOURS[number % 3]
        Image.new("RGB", (48, 32), colour).save(folder / "images" / f"{number}.png")
        lines += [(f"images/{number}.png", f"What colour is part {row}?", colour) for row in range(rows)]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_path", "question", "answer"), *lines])
    return folder / "rows.csv"


def write_run(folder: Path, table: Path, right: Sequence[bool], overrides: Sequence[str] = (), **result: Any) -> Path:
    """A run that answered the rows of `table`, those that are not `right` with "no"."""
    words = ["data=csv", f"data.train={table}", f"data.validation={table}", "task.metrics=[exact_match,anls]"]
    write_config(folder, [*words, *overrides])
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    answers = [(*row, row[2] if yes else "no", float(yes)) for row, yes in zip(rows, right, strict=True)]
    with (folder / "predictions.csv").open("w", newline="") as out:
        csv.writer(out).writerows([(*header, "answer_predictions", "score"), *answers])
    mean = float(np.mean(right))
    curve = [{"step": step, "train/loss": 2 / step, "eval/exact_match": mean * step / 40} for step in (10, 20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    write_result(folder, objective=mean, metrics={"eval/exact_match": mean} | result.pop("metrics", {}), **result)
    return folder


def write_config(folder: Path, overrides: Sequence[str]) -> Path:
    config, _ = compose.read("train", overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
    return folder


def write_result(folder: Path, **values: Any) -> None:
    speed = {"training_seconds": 60.0, "examples_per_second": 20.0, "tokens_per_second": 700.0}
    memory = {"peak_rss_bytes": 10**9, "peak_device_bytes": 0}
    result = {"status": "completed", "steps": 40, "examples": 1200, "speed": speed, "memory": memory, "error": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result | values))


def write_failure(folder: Path, failure: str, message: str) -> None:
    error = {"type": "Killed", "failure": failure, "message": message}
    write_result(folder, status="failed", objective=None, metrics={}, error=error)


def write_sweep(folder: Path, swept: Sequence[Sequence[str]]) -> None:
    """sweep.json of a sweep whose trials have these overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = [{"number": number, "overrides": [*own], "swept": [*own]} for number, own in enumerate(swept)]
    content = {"name": folder.name, "metric": "exact_match", "overrides": [], "trials": trials}
    (folder / "sweep.json").write_text(json.dumps(content))


def answered(images: int, rows: int, share: float, seed: int) -> list[bool]:
    """Which rows are right, about this share of them; the rows of one image are alike."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=(images, 1)) * 0.6 + rng.normal(size=(images, rows)) * 0.8  # of variance 1
    return [bool(right) for right in (hardness < NormalDist().inv_cdf(share)).ravel()]
