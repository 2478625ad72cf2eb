"""Statistics of paired runs, against scipy's and against chance itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlmtune.comparison import ranking
from vlmtune.metrics.statistics import Floats, bootstrap, holm, interval, mcnemar, per_image, sign_flip

RATE = 0.05
IMAGES, ROWS, DRAWS = 60, 4, 1000


def scores(seed: int, shares: tuple[float, ...] = (0.93, 0.85)) -> tuple[Floats, Floats]:
    """Sums and rows per image, of images with one row to five."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(50), rng.integers(1, 6, 50))
    return per_image((rng.random((len(images), len(shares))) < shares).astype(float), list(images))


# ---------------------------------------------------------------- against scipy


def test_sums_are_those_of_each_image() -> None:
    sums, rows = per_image(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), ["b", "a", "b"])
    assert (sums.tolist(), rows.tolist()) == ([[1, 1], [1, 1]], [2, 1])


@pytest.mark.parametrize("of", ["mean", "difference"])
def test_intervals_are_scipys(of: str) -> None:
    """BCa over images of unequal numbers of rows, for a skewed mean and for a paired difference."""
    sums, rows = scores(0)
    values = sums[:, 0] if of == "mean" else sums[:, 0] - sums[:, 1]
    drawn = bootstrap(values[:, None], rows, np.random.default_rng(1), 20_000)[:, 0]
    theirs = stats.bootstrap(
        (values, rows),
        lambda part, count, axis=-1: part.sum(axis) / count.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    )
    assert interval(drawn, values, rows, 0.95) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)
    assert np.std(drawn, ddof=1) == pytest.approx(theirs.standard_error, rel=0.03)


@pytest.mark.parametrize("images", [9, 50])
def test_p_values_are_scipys(images: int) -> None:
    """All 512 signs of nine images, and drawn signs of more."""
    sums, _ = scores(3)
    differences = (sums[:, [0]] - sums[:, [1]])[:images]
    theirs = stats.permutation_test(
        (differences[:, 0],),
        lambda values, axis: values.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    [ours] = sign_flip(differences, np.random.default_rng(2), 20_000)
    assert ours == pytest.approx(theirs.pvalue, abs=1e-12 if images == 9 else 0.01)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 5), (30, 12), (700, 800), (4000, 3600)])
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    theirs = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(theirs, rel=1e-9)


def test_holm_steps_down() -> None:
    """Worked by hand: 4 x 0.01, 3 x 0.02, 2 x 0.03 (not below the one before), 1 x 0.5."""
    assert holm([0.5, 0.03, 0.01, 0.02]) == pytest.approx([0.5, 0.06, 0.04, 0.06])
    assert holm([0.01, 0.02], family=10) == pytest.approx([0.1, 0.18])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("constant", [0.0, 0.25])
def test_equal_differences_are_no_nan(constant: float) -> None:
    """BCa is undefined there; scipy gives NaN."""
    differences, rows = np.full((30, 1), constant), np.ones(30)
    drawn = bootstrap(differences, rows, np.random.default_rng(0), 500)
    assert interval(drawn[:, 0], differences[:, 0], rows, 0.95) == pytest.approx((constant, constant))
    [p] = sign_flip(differences, np.random.default_rng(0), 500)
    assert p == (1 if constant == 0 else pytest.approx(1 / 501))


def test_one_image_says_nothing() -> None:
    one, rows = np.array([[3.0]]), np.array([4.0])
    assert interval(bootstrap(one, rows, np.random.default_rng(0), 100)[:, 0], one[:, 0], rows, 0.95) == (0.75, 0.75)
    assert sign_flip(one, np.random.default_rng(0), 100).tolist() == [1.0]


def test_draws_are_those_of_the_seed() -> None:
    sums, rows = scores(0)
    first, again, other = (bootstrap(sums, rows, np.random.default_rng(seed), 50) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# ---------------------------------------------------------------- against chance


def drawn_runs(rng: np.random.Generator, runs: int, better: float = 0.0) -> Floats:
    """Right or wrong `[rows, runs]`: images differ in how hard they are, and in how hard they are for each run. The
    first run is `better` by so many standard deviations.
    """
    image = rng.normal(size=(IMAGES, 1, 1)) + rng.normal(size=(IMAGES, 1, runs))
    ability = np.array([better, *[0.0] * (runs - 1)])
    right = image + 0.5 * rng.normal(size=(IMAGES, ROWS, runs)) < 0.8 + ability
    return right.reshape(IMAGES * ROWS, runs).astype(float)


OF_IMAGE = [row // ROWS for row in range(IMAGES * ROWS)]


def p_to_the_best(values: Floats, rng: np.random.Generator, images: list[int]) -> list[float]:
    sums, _ = per_image(values, images)
    best = int(np.argmax(values.mean(axis=0)))
    found = ranking.significance(sums - sums[:, [best]], best, rng, RATE)
    return [p for at, p in enumerate(found) if at != best]


@pytest.mark.parametrize("runs", [2, 6])
def test_equal_runs_are_told_apart_at_most_at_the_stated_rate(runs: int) -> None:
    """In 1,000 sweeps of equally good runs, the best chosen by its score; three standard errors are for chance."""
    rng = np.random.default_rng(runs)
    false = sum(min(p_to_the_best(drawn_runs(rng, runs), rng, OF_IMAGE)) <= RATE for _ in range(DRAWS))
    assert false / DRAWS <= RATE + 3 * (RATE * (1 - RATE) / DRAWS) ** 0.5


def test_a_planted_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    found = [p_to_the_best(drawn_runs(rng, 6, better=1.5), rng, OF_IMAGE) for _ in range(100)]
    assert np.mean(np.array(found) <= RATE) > 0.9


def test_what_the_corrections_are_for() -> None:
    """Rows taken as independent, or Holm over the trials without regard to how the best was chosen, err too often."""
    rng, rows, others = np.random.default_rng(0), 0, 0
    sweeps = 500
    for _ in range(sweeps):
        values = drawn_runs(rng, 6)
        rows += min(p_to_the_best(values, rng, list(range(IMAGES * ROWS)))) <= RATE
        sums, _ = per_image(values, OF_IMAGE)
        best = int(np.argmax(values.mean(axis=0)))
        others += min(holm(list(sign_flip(np.delete(sums, best, 1) - sums[:, [best]], rng, 2000)))) <= RATE
    assert rows / sweeps > 3 * RATE
    assert others / sweeps > 1.25 * RATE
