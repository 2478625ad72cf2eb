from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from vlmtune.record import report
from vlmtune.record.drawing import chart, ticks
from vlmtune.record.metrics_file import MetricsFile

RESULT: dict[str, Any] = {
    "status": "completed",
    "objective": 0.912,
    "steps": 400,
    "examples": 12800,
    "metrics": {"eval/exact_match": 0.912, "eval/anls": 0.95, "eval/loss": 0.21, "baseline/exact_match": 0.07},
    "speed": {"examples_per_second": 123.4, "tokens_per_second": 23456.7},
    "memory": {"peak_rss_bytes": 2**31, "peak_device_bytes": None},
    "error": None,
}
CONFIG = "data:\n  columns: {image: image_path, question: q, answer: a}\nmodel:\n  name: pico & co\n"
ATTACK = '<script>alert("x")</script>'
ROWS = [
    ("a.png", "What colour is the circle?", "red", "red", 1.0),
    ("b.png", "Is there a <b>square</b>?", "yes", ATTACK, 0.0),
    ("c.png", "", "a small blue triangle above a large green square", "a blue triangle above a square", 0.77),
    ("d.png", "NA", "None", "", 0.0),
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(10, 401, 10):
        loss = math.nan if step == 200 else 3 * math.exp(-step / 90) + 0.2 + 0.05 * math.sin(step)
        file.log({"train/loss": loss, "train/learning_rate": 2e-4 * math.cos(step / 260), "time/step": 0.1}, step)
        if step % 100 == 0:
            file.log({"eval/loss": loss, "eval/exact_match": 0.2 + step / 560, "eval/anls": 0.3 + step / 620}, step)
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "config.yaml").write_text(CONFIG)
    with (tmp_path / "predictions.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image_path", "q", "a", "answer_predictions", "score"])
        writer.writerows(ROWS)
    return tmp_path


def write(folder: Path, images: Any = None) -> Path:
    """The report of what lies in the folder."""
    path = folder / "result.json"
    return report.write(folder, json.loads(path.read_text()) if path.exists() else {}, images)


def picture(row: int) -> Image.Image | None:
    image = Image.new("RGB", (640, 360), "white")
    ImageDraw.Draw(image).ellipse((220, 80, 420, 280), fill=["red", "green", "blue", "black"][row])
    return None if row == 3 else image


class Elements(HTMLParser):
    """Collects elements and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def test_the_page_shows_the_run(run_folder: Path) -> None:
    page = write(run_folder, images=picture).read_text()
    elements = Elements(page)
    assert len(elements.named("svg")) == 3
    assert len(elements.named("img")) == 3
    assert len(elements.named("article")) == len(ROWS)
    assert "train/loss, step 400: " in page
    assert "+0.8420" in page  # exact_match from 0.07 to 0.912
    assert "2.00 GiB" in page
    assert "(1 not finite)" in page
    assert "<dd>None</dd>" in page  # a text, not a missing value
    assert page.count("✗ wrong") == 2
    assert page.count("✓ right") == page.count("◐ partly right") == 1


def test_a_test_split_gets_its_column(run_folder: Path) -> None:
    assert "<th>test</th>" not in write(run_folder).read_text()
    metrics = RESULT["metrics"] | {"test/exact_match": 0.885}
    (run_folder / "result.json").write_text(json.dumps(RESULT | {"metrics": metrics}))
    page = write(run_folder).read_text()
    assert "<th>test</th>" in page
    assert "<td>0.885</td>" in page


def test_the_page_loads_nothing(run_folder: Path) -> None:
    """A report is mailed around and opened on a cluster's login node."""
    elements = Elements(write(run_folder, images=picture).read_text())
    assert elements.named("script") + elements.named("link") == []
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in elements.named("img"))


def test_untrusted_text_stays_text(run_folder: Path) -> None:
    (run_folder / "result.json").write_text(json.dumps({"status": "failed", "error": {"type": "E", "message": ATTACK}}))
    page = write(run_folder).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2
    assert "Is there a &lt;b&gt;square&lt;/b&gt;?" in page
    assert "pico &amp; co" in page


@pytest.mark.parametrize("missing", ["metrics.jsonl", "result.json", "config.yaml", "predictions.csv"])
def test_a_run_that_died_early_still_has_a_page(run_folder: Path, missing: str) -> None:
    (run_folder / missing).unlink()
    assert "</html>" in write(run_folder, images=picture).read_text()


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "</html>" in write(tmp_path).read_text()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result | {"objective": None, "metrics": {"eval/loss": None}, "speed": None, "memory": None},
        lambda result: {"status": "interrupted"},
    ],
)
def test_results_of_diverged_and_interrupted_runs(run_folder: Path, spoil: Callable[[Any], Any]) -> None:
    (run_folder / "result.json").write_text(json.dumps(spoil(RESULT)))
    assert "</html>" in write(run_folder).read_text()


def test_rows_without_a_score_are_left_out(run_folder: Path) -> None:
    (run_folder / "predictions.csv").write_text("image_path,q,a,answer_predictions,score\na.png,who?,me,you,\n")
    assert not Elements(write(run_folder).read_text()).named("article")


@pytest.mark.parametrize(("low", "high"), [(0.13, 0.94), (0, 1), (-3, 7), (1e-5, 2e-4), (5, 5), (0, 0), (1, 1e6)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8


def test_a_long_curve_is_thinned_and_a_gap_is_not_bridged() -> None:
    points = [(float(step), None if step == 3001 else 1.0 / step) for step in range(1, 6002)]
    (curve,) = chart("Loss", {"train/loss": points}, {}).curves
    assert 300 < len(curve.dots) <= 600
    assert curve.dots[-1][2].startswith("train/loss, step 6,001")
    assert curve.missing == 1
    (short,) = chart("Loss", {"train/loss": [(1, 1.0), (2, 0.9), (3, None), (4, 0.8), (5, 0.7)]}, {}).curves
    assert len(short.segments) == 2
    assert all(re.fullmatch(r"[\d.]+,[\d.]+ [\d.]+,[\d.]+", segment) for segment in short.segments)
