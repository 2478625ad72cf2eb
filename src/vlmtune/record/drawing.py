"""Charts of a page as SVG: everything is laid out here, in pixels, and a template writes it down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float | None]
Scale = Callable[[float], float]

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
PLOT = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
"""Where a chart's lines are: left, top, right, bottom."""
MOST_POINTS = 600
COLOURS = 6


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


def chart(title: str, curves: Mapping[str, Sequence[Point]], baselines: dict[str, float]) -> Chart:
    """Lay out curves of (step, value) on shared axes; `baselines` are values before training, by curve."""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points if value is not None] + [*baselines.values()]
    x_ticks, y_ticks = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    x = scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    names = list(curves)
    return Chart(
        title,
        [curve(name, at % COLOURS, curves[name], x, y) for at, name in enumerate(names)],
        [(x(tick), count(tick)) for tick in x_ticks if min(steps) <= tick <= max(steps) and tick.is_integer()],
        [(y(tick), f"{tick:.6g}") for tick in y_ticks],
        [(y(then), f"{name} before: {number(then)}", names.index(name) % COLOURS) for name, then in baselines.items()],
    )


def scale(low: float, high: float, start: int, end: int) -> Scale:
    """The function from values to pixels that takes `low` to `start` and `high` to `end`."""
    return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def curve(name: str, colour: int, points: Sequence[Point], x: Scale, y: Scale) -> Curve:
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
        dots.append((x(step), y(value), f"{name}, step {count(step)}: {number(value)}"))
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
    return [float(f"{at * step:.12g}") for at in range(first, last + 1)]


def number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"
