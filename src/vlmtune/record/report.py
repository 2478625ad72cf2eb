"""report.html: one page that shows a run, made from its folder alone, with nothing to load from anywhere else."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from vlmtune.record.metrics_file import read_metrics
from vlmtune.record.runfolder import write_whole
from vlmtune.record.samples import thumbnail

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float | None]
Scale = Callable[[float], float]
ImageOf = Callable[[int], "Image.Image | None"]
TextsOf = Callable[[int], tuple[str, str]]

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
MOST_POINTS = 600
SAMPLES_PER_VERDICT = 8
THUMBNAIL_SIDE = 220


@dataclass(frozen=True)
class Curve:
    """One line of a chart: pixels to draw, and a title per point that hovering shows."""

    name: str
    colour: int
    segments: list[str]
    dots: list[tuple[float, float, str]]
    missing: int
    """Logged values that were NaN or infinite; the line has a gap there."""


@dataclass(frozen=True)
class Chart:
    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    baselines: list[tuple[float, str, int]]
    """Dashed lines: height in pixels, title, colour."""


def write(folder: Path, result: dict[str, Any], images: ImageOf | None = None, texts: TextsOf | None = None) -> Path:
    """Write `folder`/report.html from the result and metrics.jsonl, config.yaml, predictions.csv: those that exist.

    `images` gives the picture of a row of predictions.csv, counted from 0, or None where there is none; `texts` its
    question and reference, which are otherwise read from the columns of the config.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    metrics = result.get("metrics") or {}
    config = _text(folder / "config.yaml")
    history = read_metrics(folder / "metrics.jsonl")
    # Answers and questions are anybody's text: everything is escaped.
    loader = FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, **options)
    page = environment.get_template("report.html.j2").render(
        name="/".join(folder.resolve().parts[-2:]),
        result=result,
        figures=_figures(result),
        metrics=_before_and_after(metrics),
        charts=_charts(history, metrics),
        timings=_timings(history),
        samples=_samples(folder / "predictions.csv", _columns(config), images, texts),
        config=config,
        size=(WIDTH, HEIGHT),
        plot=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    )
    path = folder / "report.html"
    write_whole(path, page)
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _columns(config: str) -> tuple[str, str]:
    """The names of the question and answer columns in predictions.csv."""
    columns = ((yaml.safe_load(config) or {}).get("data") or {}).get("columns") or {}
    return columns.get("question") or "question", columns.get("answer") or "answer"


def _figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The run in a few numbers, each only if it is known."""
    speed, memory = result.get("speed") or {}, result.get("memory") or {}
    figures = [
        ("objective", result.get("objective"), _number),
        ("optimizer steps", result.get("steps"), _count),
        ("examples seen", result.get("examples"), _count),
        ("examples / s", speed.get("examples_per_second"), _number),
        ("tokens / s", speed.get("tokens_per_second"), _number),
        ("peak device memory", memory.get("peak_device_bytes"), _bytes),
        ("peak main memory", memory.get("peak_rss_bytes"), _bytes),
    ]
    return [(name, show(value)) for name, value, show in figures if value is not None]


def _before_and_after(metrics: dict[str, float | None]) -> list[tuple[str, str, str, str, str]]:
    """Rows of name, value before training, value after, change, value on the test rows."""
    names = dict.fromkeys(key.split("/", 1)[1] for key in metrics if key.startswith(("eval/", "baseline/", "test/")))
    rows = []
    for name in names:
        before, after = metrics.get(f"baseline/{name}"), metrics.get(f"eval/{name}")
        change = "" if before is None or after is None else f"{after - before:+.4f}"
        test = _number(metrics[f"test/{name}"]) if f"test/{name}" in metrics else ""
        rows.append((name, _number(before), _number(after), change, test))
    return rows


def _timings(history: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Median and greatest value of each `time/...` key."""
    values: dict[str, list[float]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith("time/") and value is not None:
                values.setdefault(key.removeprefix("time/"), []).append(value)
    return [(name, _number(median(found)), _number(max(found))) for name, found in values.items()]


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


def chart(title: str, curves: Mapping[str, Sequence[Point]], baselines: dict[str, float]) -> Chart:
    """Lay out curves of (step, value) on shared axes; `baselines` are values before training, by curve."""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points if value is not None] + [*baselines.values()]
    x_ticks, y_ticks = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    x = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    names = list(curves)
    return Chart(
        title,
        [_curve(name, number % 6, curves[name], x, y) for number, name in enumerate(names)],
        [(x(tick), _count(tick)) for tick in x_ticks if min(steps) <= tick <= max(steps) and tick.is_integer()],
        [(y(tick), f"{tick:.6g}") for tick in y_ticks],
        [(y(value), f"{name} before: {_number(value)}", names.index(name) % 6) for name, value in baselines.items()],
    )


def _scale(low: float, high: float, start: int, end: int) -> Scale:
    """The function from values to pixels that takes `low` to `start` and `high` to `end`."""
    return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def _curve(name: str, colour: int, points: Sequence[Point], x: Scale, y: Scale) -> Curve:
    """Draw one line, thinned to `MOST_POINTS` with its last point kept, and broken where a value is missing."""
    stride = math.ceil(len(points) / MOST_POINTS)
    shown = points[(len(points) - 1) % stride :: stride]
    segments: list[list[str]] = [[]]
    dots = []
    for step, value in shown:
        if value is None:
            segments.append([])
            continue
        segments[-1].append(f"{x(step)},{y(value)}")
        dots.append((x(step), y(value), f"{name}, step {_count(step)}: {_number(value)}"))
    missing = sum(value is None for _, value in points)
    return Curve(name, colour, [" ".join(segment) for segment in segments if len(segment) > 1], dots, missing)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose `low` and `high`, at least two.

    >>> ticks(0.13, 0.94)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * magnitude for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * magnitude) <= most - 1)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _samples(
    path: Path, columns: tuple[str, str], images: ImageOf | None, texts: TextsOf | None
) -> list[dict[str, Any]]:
    """Some wrong and some right answers, spread over the file: neighbours often show the same image."""
    if not path.exists():
        return []
    csv.field_size_limit(2**31 - 1)  # a document's answer may be longer than 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    shown: list[tuple[int, str]] = []
    for verdict in ("wrong", "right", "partly right"):
        found = [number for number, row in enumerate(rows) if _verdict(row) == verdict]
        count = min(SAMPLES_PER_VERDICT, len(found))
        shown += [(found[i * len(found) // count], verdict) for i in range(count)]

    def said(number: int) -> tuple[str, ...]:
        return texts(number) if texts else tuple(rows[number].get(column) or "" for column in columns)

    return [
        {
            "row": number + 1,
            "verdict": verdict,
            "question": said(number)[0],
            "reference": said(number)[1],
            "prediction": rows[number].get("answer_predictions") or "",
            "score": _number(float(rows[number]["score"])),
            "image": _data_uri(images(number)) if images else None,
        }
        for number, verdict in sorted(shown)
    ]


def _verdict(row: dict[str, str]) -> str | None:
    """What a row's score says; None for a row that has none."""
    if not row.get("score"):
        return None
    score = float(row["score"])
    return "right" if score >= 1 else "wrong" if score <= 0 else "partly right"


def _data_uri(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    buffer = io.BytesIO()
    thumbnail(image, THUMBNAIL_SIDE).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"
