"""report.html: one page that shows a run, made from its folder alone, with nothing to load from anywhere else."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from vlmtune.metrics import PERFECT
from vlmtune.record import pages
from vlmtune.record.drawing import HEIGHT, PLOT, WIDTH, Chart, chart, count, gibibytes, number
from vlmtune.record.metrics_file import read_metrics

if TYPE_CHECKING:
    from PIL import Image

ImageOf = Callable[[int], "Image.Image | None"]
TextsOf = Callable[[int], tuple[str, str]]

SAMPLES_PER_VERDICT = 8


def write(folder: Path, result: dict[str, Any], images: ImageOf | None = None, texts: TextsOf | None = None) -> Path:
    """Write `folder`/report.html from the result and metrics.jsonl, config.yaml, predictions.csv: those that exist.

    `images` gives the picture of a row of predictions.csv, counted from 0, or None where there is none; `texts` its
    question and reference, which are otherwise read from the columns of the config.
    """
    metrics = result.get("metrics") or {}
    config = _text(folder / "config.yaml")
    history = read_metrics(folder / "metrics.jsonl")
    return pages.write(
        folder / "report.html",
        Path(__file__).with_name("report.html.j2"),
        name="/".join(folder.resolve().parts[-2:]),
        result=result,
        figures=_figures(result),
        metrics=_before_and_after(metrics),
        charts=_charts(history, metrics),
        timings=_timings(history),
        samples=_samples(folder / "predictions.csv", _columns(config), images, texts, _ends(config, result)),
        config=config,
        size=(WIDTH, HEIGHT),
        plot=PLOT,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _columns(config: str) -> tuple[str, str]:
    """The names of the question and answer columns in predictions.csv."""
    columns = ((yaml.safe_load(config) or {}).get("data") or {}).get("columns") or {}
    return columns.get("question") or "question", columns.get("answer") or "answer"


def _ends(config: str, result: dict[str, Any]) -> tuple[float, float]:
    """The score of a right answer, and that of a wrong one."""
    if result.get("objective_is") == "minimized":
        return 0.0, 1.0
    metrics = ((yaml.safe_load(config) or {}).get("task") or {}).get("metrics") or [""]
    return PERFECT.get(metrics[0], 1.0), 0.0


def _figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The run in a few numbers, each only if it is known."""
    speed, memory = result.get("speed") or {}, result.get("memory") or {}
    figures = [
        ("objective", result.get("objective"), number),
        ("optimizer steps", result.get("steps"), count),
        ("examples seen", result.get("examples"), count),
        ("examples / s", speed.get("examples_per_second"), number),
        ("tokens / s", speed.get("tokens_per_second"), number),
        ("peak device memory", memory.get("peak_device_bytes"), gibibytes),
        ("peak main memory", memory.get("peak_rss_bytes"), gibibytes),
        ("predicted for the model", memory.get("predicted_bytes"), gibibytes),
    ]
    return [(name, show(value)) for name, value, show in figures if value is not None]


def _before_and_after(metrics: dict[str, float | None]) -> list[tuple[str, str, str, str, str]]:
    """Rows of name, value before training, value after, change, value on the test rows."""
    names = dict.fromkeys(key.split("/", 1)[1] for key in metrics if key.startswith(("eval/", "baseline/", "test/")))
    rows = []
    for name in names:
        before, after = metrics.get(f"baseline/{name}"), metrics.get(f"eval/{name}")
        change = "" if before is None or after is None else f"{after - before:+.4f}"
        test = number(metrics[f"test/{name}"]) if f"test/{name}" in metrics else ""
        rows.append((name, number(before), number(after), change, test))
    return rows


def _timings(history: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Median and greatest value of each `time/...` key."""
    values: dict[str, list[float]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith("time/") and value is not None:
                values.setdefault(key.removeprefix("time/"), []).append(value)
    return [(name, number(median(found)), number(max(found))) for name, found in values.items()]


def _charts(history: list[dict[str, Any]], metrics: dict[str, float | None]) -> list[Chart]:
    """Loss, learning rate and evaluation metrics, in this order, each only if it was logged."""
    keys = list(dict.fromkeys(key for row in history for key in row if key != "step"))
    groups = {
        "Loss": [key for key in keys if key in ("train/loss", "eval/loss")],
        "Learning rate": [key for key in keys if key.startswith("train/learning_rate")],
        "Evaluation": [key for key in keys if key.startswith("eval/") and key != "eval/loss"],
    }
    charts = []
    for title, names in groups.items():
        curves = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
        before = {name: metrics.get(name.replace("eval/", "baseline/")) for name in names if name.startswith("eval/")}
        if any(value is not None for points in curves.values() for _, value in points):
            charts.append(chart(title, curves, {name: value for name, value in before.items() if value is not None}))
    return charts


def _samples(
    path: Path, columns: tuple[str, str], images: ImageOf | None, texts: TextsOf | None, ends: tuple[float, float]
) -> list[dict[str, Any]]:
    """Some wrong and some right answers, spread over the file: neighbours often show the same image."""
    if not path.exists():
        return []
    csv.field_size_limit(2**31 - 1)  # a document's answer may be longer than 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    shown: list[tuple[int, str]] = []
    for verdict in ("wrong", "right", "partly right"):
        found = [place for place, row in enumerate(rows) if _verdict(row, *ends) == verdict]
        few = min(SAMPLES_PER_VERDICT, len(found))
        shown += [(found[i * len(found) // few], verdict) for i in range(few)]

    def said(place: int) -> tuple[str, ...]:
        return texts(place) if texts else tuple(rows[place].get(column) or "" for column in columns)

    return [
        {
            "row": place + 1,
            "verdict": verdict,
            "question": said(place)[0],
            "reference": said(place)[1],
            "prediction": rows[place].get("answer_predictions") or "",
            "score": number(float(rows[place]["score"])),
            "image": pages.data_uri(picture) if images and (picture := images(place)) else None,
        }
        for place, verdict in sorted(shown)
    ]


def _verdict(row: dict[str, str], right: float, wrong: float) -> str | None:
    """What a row's score says; None for a row that has none."""
    if not row.get("score"):
        return None
    share = (float(row["score"]) - wrong) / (right - wrong)
    return "right" if share >= 1 else "wrong" if share <= 0 else "partly right"
