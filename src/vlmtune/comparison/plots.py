"""The plots of a comparison, laid out in pixels for the template: a mark per entry on axes that fit the values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev

from vlmtune.comparison.ranking import Comparison, Entry
from vlmtune.comparison.texts import interval, label, shortened
from vlmtune.config.trial_names import short_keys
from vlmtune.display import duration
from vlmtune.record.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Point, Scale, chart, scale, ticks
from vlmtune.record.metrics_file import read_metrics

Tick = tuple[float, str]
MOST_CURVES = 12
"""Entries whose learning curves are drawn, the best ones."""
WIDE = 900
MARGIN = 48
"""Of parallel coordinates: pixels beside the first and the last axis."""


@dataclass(frozen=True)
class Axis:
    """Where values are, in pixels, and what is written beside them."""

    places: list[float]
    ticks: list[Tick]


@dataclass(frozen=True)
class Mark:
    """An entry in a plot."""

    of: str
    verdict: str
    x: float
    y: float
    low: float
    high: float
    """Ends of the interval."""
    title: str


@dataclass(frozen=True)
class Plot:
    title: str
    by: str
    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    front: str = ""
    """Corners of the line through the entries that none beats in both respects."""


@dataclass(frozen=True)
class Line:
    """An entry across parallel axes."""

    of: str
    verdict: str
    points: str
    title: str


@dataclass(frozen=True)
class Parallel:
    axes: list[tuple[float, str, list[Tick]]]
    """Place, name and ticks of each axis."""
    lines: list[Line]


def plots(found: Comparison) -> list[Plot]:
    """The metric against each swept key, against time and against memory."""
    entries = found.entries
    made = []
    for key, name in zip(found.keys, short_keys(found.keys), strict=True):
        known = [entry for entry in entries if key in entry.swept]
        axis = _axis([entry.swept[key] for entry in known], LEFT + 24, WIDTH - RIGHT - 24)
        made.append(_plot(found, name, known, Axis(_side_by_side(axis.places), axis.ticks)))
    timed = [(entry, entry.seconds) for entry in entries if entry.seconds is not None]
    sized = [(entry, entry.memory) for entry in entries if entry.memory is not None]
    if len(timed) > 1:
        made.append(_cost(found, "training time", [e for e, _ in timed], [s for _, s in timed], duration))
    if len(sized) > 1:
        made.append(_cost(found, "peak memory", [e for e, _ in sized], [size / 2**30 for _, size in sized], _gibibytes))
    return [plot for plot in made if plot.marks]


def _gibibytes(value: float) -> str:
    return f"{value:g} GiB"


def _plot(found: Comparison, by: str, entries: Sequence[Entry], axis: Axis, front: str = "") -> Plot:
    metric = found.metrics[0]
    y_ticks, y = _heights(found)
    marks = []
    for entry, x in zip(entries, axis.places, strict=True):
        score = entry.scores[metric]
        title = f"{label(entry, found)}: {score.mean:.4f} ({interval(score.low, score.high)}), {score.verdict}"
        marks.append(Mark(entry.name, score.verdict, x, y(score.mean), y(score.low), y(score.high), title))
    return Plot(metric, by, marks, axis.ticks, [(y(tick), f"{tick:.6g}") for tick in y_ticks], front)


def _side_by_side(places: Sequence[float], gap: float = 7, most: float = 40) -> list[float]:
    """The places, with marks at the same one moved apart, the first in the middle."""
    count, seen = Counter(places), Counter[float]()
    found = []
    for place in places:
        step = min(gap, most / count[place])
        seen[place] += 1
        found.append(round(place + step * (seen[place] // 2) * (-1) ** seen[place], 1))
    return found


def _heights(found: Comparison) -> tuple[list[float], Scale]:
    scores = [entry.scores[found.metrics[0]] for entry in found.entries]
    y_ticks = ticks(min(score.low for score in scores), max(score.high for score in scores))
    return y_ticks, scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)


def _cost(found: Comparison, by: str, entries: list[Entry], costs: list[float], shown: Callable[[float], str]) -> Plot:
    """The metric against what an entry costs, with the front of those that are best for their cost."""
    wide = ticks(min(costs), max(costs), most=5)
    x = scale(wide[0], wide[-1], LEFT + 16, WIDTH - RIGHT - 16)
    _, y = _heights(found)
    sign = -1 if found.lower_is_better else 1
    means = [entry.scores[found.metrics[0]].mean for entry in entries]
    corners, best = list[str](), -sign * math.inf
    for cost, mean in sorted(zip(costs, means, strict=True), key=lambda pair: (pair[0], -sign * pair[1])):
        if sign * mean > sign * best:
            corners += [f"{x(cost)},{y(best)}"] * bool(corners) + [f"{x(cost)},{y(mean)}"]
            best = mean
    axis = Axis([x(cost) for cost in costs], [(x(tick), shown(tick)) for tick in wide])
    return _plot(found, by, entries, axis, " ".join(corners))


def parallel(found: Comparison) -> Parallel | None:
    """All swept keys and the metric as axes side by side; None for two keys or fewer, which their own plots show."""
    entries = [entry for entry in found.entries if all(key in entry.swept for key in found.keys)]
    if len(found.keys) < 3 or not entries:
        return None
    top, bottom = HEIGHT - BOTTOM, TOP + 18
    axes = [_axis([entry.swept[key] for entry in entries], top, bottom) for key in found.keys]
    means = [entry.scores[found.metrics[0]].mean for entry in entries]
    last = ticks(min(means), max(means))
    y = scale(last[0], last[-1], top, bottom)
    axes.append(Axis([y(mean) for mean in means], [(y(tick), f"{tick:.6g}") for tick in last]))
    x = scale(0, len(axes) - 1, MARGIN, WIDE - MARGIN)
    lines = []
    for at, entry in enumerate(entries):
        points = " ".join(f"{x(place)},{axis.places[at]}" for place, axis in enumerate(axes))
        lines.append(Line(entry.name, entry.scores[found.metrics[0]].verdict, points, label(entry, found)))
    names = [*short_keys(found.keys), found.metrics[0]]
    return Parallel([(x(at), names[at], axis.ticks) for at, axis in enumerate(axes)], lines[::-1])


def curves(found: Comparison) -> list[Chart]:
    """Learning curves of the best entries over each other; those of seeds as their mean."""
    entries = found.entries[:MOST_CURVES]
    histories = {entry.name: [read_metrics(run.folder / "metrics.jsonl") for run in entry.runs] for entry in entries}
    made = []
    for key in (f"eval/{found.metrics[0]}", "eval/loss", "train/loss"):
        lines = {name: _mean_curve(history, key) for name, history in histories.items()}
        lines = {name: points for name, points in lines.items() if any(value is not None for _, value in points)}
        if lines:
            made.append(chart(key, lines, {}))
    return made


def _mean_curve(histories: Sequence[Sequence[dict[str, float | None]]], key: str) -> list[Point]:
    values: dict[float, list[float | None]] = {}
    for history in histories:
        last = {row["step"]: row[key] for row in history if key in row}
        for step, value in last.items():
            values.setdefault(float(step or 0), []).append(value)
    return [
        (step, None if None in found else fmean(value for value in found if value is not None))
        for step, found in sorted(values.items())
    ]


# ---------------------------------------------------------------- axes


def _axis(values: Sequence[str], start: int, end: int) -> Axis:
    """An axis for values as they were typed: linear or logarithmic for numbers, a place each for others."""
    numbers = [_number(value) for value in values]
    known = [value for value in numbers if value is not None]
    if len(known) < len(values) or not values:
        names = list(dict.fromkeys(values))
        x = scale(0, max(len(names) - 1, 1), start, end)
        place = {name: x(at) if len(names) > 1 else (start + end) / 2 for at, name in enumerate(names)}
        return Axis([place[value] for value in values], [(place[name], shortened(name, 14)) for name in names])
    if is_logarithmic(known):
        x = scale(math.log(min(known)), math.log(max(known)), start, end)
        return Axis([x(math.log(v)) for v in known], _apart([(x(math.log(v)), _plain(v)) for v in sorted(set(known))]))
    marks = ticks(min(known), max(known), most=5)
    x = scale(marks[0], marks[-1], start, end)
    return Axis([x(v) for v in known], [(x(tick), _plain(tick)) for tick in marks])


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether the values are spread by factors rather than by steps: 4, 8, 16 are, and 0.1, 0.2, 0.3 are not."""
    distinct = sorted(set(values))
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    if len(distinct) == 2:
        return distinct[1] / distinct[0] >= 8
    steps = [after - before for before, after in pairwise(distinct)]
    factors = [math.log(after / before) for before, after in pairwise(distinct)]
    return pstdev(factors) / fmean(factors) < pstdev(steps) / fmean(steps)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _plain(value: float) -> str:
    """A number as people type it: `16`, `0.05`, `1e-4`."""
    if value and abs(value) < 0.01:
        head, _, power = f"{value:.2e}".partition("e")
        return f"{float(head):g}e{int(power)}"
    return f"{value:g}"


def _apart(marks: list[Tick], least: float = 34) -> list[Tick]:
    """The ticks without those too close to the one before."""
    kept: list[Tick] = []
    for place, text in marks:
        if not kept or abs(place - kept[-1][0]) >= least:
            kept.append((place, text))
    return kept
