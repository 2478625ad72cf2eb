"""Whether runs differ by more than chance, from their scores on the same rows.

Rows about one image are not independent, so images are drawn and exchanged, never rows. All functions take sums per
image, `[images, runs]`, and use one set of draws for all runs: whatever is compared is paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CELLS = 4_000_000
"""Draws are made in blocks of this many numbers, some 32 MB."""


def per_image(values: Floats, images: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Sums `[images, runs]` of values `[rows, runs]` over the rows of each image, and the rows of each `[images]`."""
    number: dict[Hashable, int] = {}
    of_row = np.array([number.setdefault(image, len(number)) for image in images], dtype=np.intp)
    sums = np.zeros((len(number), values.shape[1]))
    np.add.at(sums, of_row, values)
    return sums, np.bincount(of_row, minlength=len(number)).astype(float)


def bootstrap(sums: Floats, rows: Floats, rng: np.random.Generator, draws: int) -> Floats:
    """The means `[draws, runs]` over as many images as there are, drawn with replacement.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 6.
    """
    images = len(rows)
    means = np.empty((draws, sums.shape[1]))
    for start, stop in _blocks(draws, images):
        count = stop - start
        chosen = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        times = np.bincount(chosen.ravel(), minlength=count * images).reshape(count, images).astype(float)
        means[start:stop] = times @ sums / (times @ rows)[:, None]
    return means


def interval(drawn: Floats, sums: Floats, rows: Floats, confidence: float) -> tuple[float, float]:
    """The BCa interval of a mean, from its bootstrap `[draws]` and the sums it was drawn from `[images]`.

    BCa, because scores near 0 or 1 are skewed, where plain percentiles miss on one side. It is undefined where every
    draw is the same; the interval is then that value alone.

    Source: Efron 1987, Better Bootstrap Confidence Intervals, section 3.
    """
    point = float(sums.sum() / rows.sum())
    if len(rows) < 2 or np.ptp(drawn) <= 1e-12 * max(1.0, abs(point)):
        return point, point
    normal = NormalDist()
    below = (np.sum(drawn < point) + np.sum(drawn <= point)) / (2 * len(drawn))  # draws at the point count half
    bias = normal.inv_cdf(min(max(float(below), 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    without = (sums.sum() - sums) / (rows.sum() - rows)  # the mean without each image
    spread = without.mean() - without
    cubes, squares = float(np.sum(spread**3)), float(np.sum(spread**2))
    skew = cubes / (6 * squares**1.5) if squares else 0.0

    def end(share: float) -> float:
        shifted = bias + normal.inv_cdf(share)
        return float(np.quantile(drawn, normal.cdf(bias + shifted / (1 - skew * shifted))))

    return end((1 - confidence) / 2), end((1 + confidence) / 2)


def mean_intervals(
    scores: Sequence[Mapping[str, float]],
    names: Sequence[str],
    images: Sequence[Hashable],
    confidence: float = 0.95,
    draws: int = 2000,
) -> dict[str, tuple[float, float]]:
    """The BCa interval of the mean of each metric in `names`, from scores per row. `images`: the image of each row."""
    sums, rows = per_image(np.array([[row[name] for name in names] for row in scores]), images)
    drawn = bootstrap(sums, rows, np.random.default_rng(0), draws)
    return {name: interval(drawn[:, at], sums[:, at], rows, confidence) for at, name in enumerate(names)}


def sign_flip(differences: Floats, rng: np.random.Generator, draws: int) -> Floats:
    """Two-sided p-values `[runs]` of paired differences per image `[images, runs]`.

    Where two runs are equally good, each image's difference could as well have the other sign. All ways to choose signs
    are tried if there are no more than `draws`, else `draws` of them.

    Source: Good 2005, Permutation, Parametric, and Bootstrap Tests of Hypotheses, section 3.2.
    """
    differences = differences[np.any(differences != 0, axis=1)]  # equal images change nothing
    images, observed = len(differences), np.abs(differences.sum(axis=0))
    least = observed * (1 - 1e-12) - 1e-12  # sums in another order differ in the last digits
    exact = 2**images <= draws if images < 63 else False
    total = 2**images if exact else draws
    extreme = np.zeros(differences.shape[1])
    for start, stop in _blocks(total, images):
        if exact:
            bits = np.arange(start, stop)[:, None] >> np.arange(images) & 1
        else:
            bits = rng.integers(0, 2, size=(stop - start, images), dtype=np.int8)
        extreme += (np.abs((2.0 * bits - 1) @ differences) >= least).sum(axis=0)
    return extreme / total if exact else (extreme + 1) / (total + 1)


def holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """p-values for several questions at once: the chance of one false answer or more stays below the level.

    `family`: how many questions were asked, if more than are given; those left out count as answered last, which errs
    on the safe side.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    count = len(p_values) if family is None else family
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (count - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two runs are right equally often; it takes rows as independent.

    `only_first`, `only_second`: the rows on which only one of them is right.

    Source: McNemar 1947, with the binomial distribution in place of its normal limit.

    >>> mcnemar(1, 5)
    0.21875
    """
    rows = only_first + only_second
    ways, at_most = 1, 0
    for right in range(min(only_first, only_second) + 1):
        at_most += ways
        ways = ways * (rows - right) // (right + 1)
    return min(1.0, 2 * at_most / 2**rows)


def _blocks(count: int, width: int) -> list[tuple[int, int]]:
    """`count` draws of `width` numbers, cut so that a block stays small."""
    step = max(1, CELLS // max(width, 1))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
