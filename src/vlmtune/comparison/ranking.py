"""Which runs are better, and whether by more than chance.

compare
├── runs.find, runs.grouped     what was tried; runs that differ in their seed alone are one entry
├── rows.read, rows.check_same  the rows that all of them answered
├── statistics.bootstrap        intervals of the means and of the differences to the best, over images
├── statistics.sign_flip, holm  verdicts: better, worse or tie
└── notes                       what the numbers don't say
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from vlmtune.commands import typed
from vlmtune.comparison import rows
from vlmtune.comparison.rows import Key, Rows
from vlmtune.comparison.runs import Run, find, grouped
from vlmtune.config.trial_names import SEED
from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics import METRICS, statistics
from vlmtune.metrics.statistics import Floats

DRAWS, MOST_DRAWS = 10_000, 200_000


@dataclass(frozen=True)
class Score:
    """An entry on one metric."""

    mean: float
    low: float
    high: float
    spread: float | None
    """Standard deviation of the seeds' means; None with one seed."""
    difference: float
    """To the best entry, on the same rows; its interval is for this pair alone."""
    difference_low: float
    difference_high: float
    p: float
    """Holm's, over all pairs of entries."""
    verdict: str
    """`best`, `better`, `worse` or `tie`."""
    mcnemar: float | None
    """Exact, for rows that are right or wrong; not corrected. None for other metrics, and for several seeds."""


@dataclass(frozen=True)
class Entry:
    """A run, or runs that differ in their seed alone."""

    runs: list[Run]
    rows: list[Rows]
    swept: dict[str, str]
    scores: dict[str, Score]

    @property
    def name(self) -> str:
        return "+".join(run.name for run in self.runs)

    @property
    def seconds(self) -> float | None:
        return _mean([run.seconds for run in self.runs])

    @property
    def memory(self) -> float | None:
        return _mean([run.memory for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    """Entries, the best first, and what could not be compared."""

    entries: list[Entry]
    left_out: list[tuple[Run, str]]
    """Runs without scores, each with the reason."""
    metrics: list[str]
    """The first one ranks."""
    keys: list[str]
    """The keys by which entries differ."""
    rows: list[Key]
    images: int
    confidence: float
    notes: list[str]
    lower_is_better: bool = False
    """Of the metric that ranks."""


def compare(
    folders: Sequence[Path], *, metric: str | None = None, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Rank the runs in these folders, each a run's or a sweep's.

    `metric`: the one that ranks; None: the runs' own first one. `confidence`: of the intervals; verdicts err with the
    rest of it. Raises VlmtuneError for folders that hold no runs and for runs that answered different rows.
    """
    runs = find(folders)
    left_out = [(run, reason) for run in runs if (reason := _why_not(run))]
    groups = [[rows.read(run) for run in group] for group in grouped([run for run in runs if not _why_not(run)])]
    keys = list(dict.fromkeys(key for run in runs for key in run.swept if key != SEED))
    if not groups:
        return Comparison([], left_out, [metric] if metric else [], keys, [], 0, confidence, [])
    rows.check_same(groups)
    metrics = _metrics([read.run for group in groups for read in group], metric)
    common = list(rows.of_group(groups[0]))
    measured = {name: _measured(groups, name, common) for name in metrics}
    signs = {name: -1 if groups[0][0].run.lower_is_better(name) else 1 for name in metrics}
    best = int(np.argmax(signs[metrics[0]] * measured[metrics[0]][0].mean(axis=0)))
    images = _images(groups[0], common)
    judged = {name: _judged(*found, images, best, confidence, seed, signs[name]) for name, found in measured.items()}
    order = sorted(range(len(groups)), key=lambda at: (at != best, -signs[metrics[0]] * judged[metrics[0]][at].mean))
    entries = [_entry(groups[at], {name: judged[name][at] for name in metrics}) for at in order]
    made = Comparison(entries, left_out, metrics, keys, common, len(set(images)), confidence, [], signs[metrics[0]] < 0)
    made.notes.extend(notes(made))
    return made


def _entry(group: list[Rows], scores: dict[str, Score]) -> Entry:
    return Entry([read.run for read in group], group, group[0].run.swept, scores)


def _why_not(run: Run) -> str:
    """Why a run can't be ranked; empty if it can."""
    if run.status != "completed":
        failure, message = run.failure
        return ": ".join(filter(None, [run.status, failure, message]))
    if not run.metrics:
        return "its config.yaml is missing"
    return "" if (run.folder / "predictions.csv").is_file() else "no evaluated rows (it has no validation split)"


def _metrics(runs: Sequence[Run], wanted: str | None) -> list[str]:
    """The metric that ranks, then the others that all runs have. Raises ConfigError."""
    own = runs[0].metrics
    known = [name for name in own if all(_has(run, name) for run in runs)]
    if wanted is None:
        for run in runs:
            if run.metrics[:1] != own[:1]:
                raise ConfigError(
                    f"{runs[0].folder} and {run.folder}: have different objectives, {own[0]} and {run.metrics[0]}; "
                    "choose one: metric=NAME"
                )
        return known
    if not all(_has(run, wanted) for run in runs):
        raise ConfigError(f"metric={wanted}: {nearest(wanted, [*METRICS, *known])}")
    return [wanted, *(name for name in known if name != wanted)]


def _has(run: Run, metric: str) -> bool:
    """Whether a run's rows have scores of the metric: those of a user's own one are only known from predictions.csv."""
    return metric in METRICS or metric in run.scored


def _images(group: Sequence[Rows], keys: Sequence[Key]) -> list[object]:
    found = {key: image for read in group for key, image in zip(read.keys, read.images(), strict=True)}
    return [found[key] for key in keys]


def _measured(groups: list[list[Rows]], metric: str, keys: Sequence[Key]) -> tuple[Floats, list[float | None]]:
    """Scores `[rows, entries]`, and each entry's spread over its seeds; None for a single run."""
    answers = rows.references(groups, metric)
    values = rows.matrix(groups, metric, keys, answers)
    means = [[fmean(read.scores(metric, answers)) for read in group] if len(group) > 1 else [] for group in groups]
    return values, [stdev(of_seeds) if of_seeds else None for of_seeds in means]


def _judged(
    values: Floats,
    spreads: list[float | None],
    images: list[object],
    best: int,
    confidence: float,
    seed: int,
    sign: int,
) -> list[Score]:
    """The scores of all entries on one metric, from `[rows, entries]`. `sign`: -1 where lower is better, else 1."""
    rng = np.random.default_rng(seed)
    sums, counts = statistics.per_image(values, images)
    drawn = statistics.bootstrap(sums, counts, rng, DRAWS)
    differences = sums - sums[:, [best]]
    p_values = significance(differences, best, rng, 1 - confidence)
    found = []
    for at, spread in enumerate(spreads):
        low, high = statistics.interval(drawn[:, at], sums[:, at], counts, confidence)
        apart = statistics.interval(drawn[:, at] - drawn[:, best], differences[:, at], counts, confidence)
        difference = float(differences[:, at].sum() / counts.sum())
        verdict = "best" if at == best else _verdict(sign * difference, p_values[at], 1 - confidence)
        single = at != best and spread is None and spreads[best] is None
        exact = _mcnemar(values[:, at], values[:, best]) if single else None
        mean = float(sums[:, at].sum() / counts.sum())
        found.append(Score(mean, low, high, spread, difference, *apart, p_values[at], verdict, exact))
    return found


def significance(differences: Floats, best: int, rng: np.random.Generator, error: float) -> list[float]:
    """Holm's p-value of each entry's differences to the best, `[images, entries]`.

    The best was chosen by its score, so that comparing with it is as good as comparing all pairs: Holm's correction is
    over all of them.
    """
    entries = differences.shape[1]
    pairs = entries * (entries - 1) // 2
    draws = min(max(DRAWS, int(4 * pairs / error)), MOST_DRAWS)  # a p-value is at least one in so many
    others = [at for at in range(entries) if at != best]
    adjusted = statistics.holm(list(statistics.sign_flip(differences[:, others], rng, draws)), max(pairs, 1))
    found = dict(zip(others, map(float, adjusted), strict=True))
    return [found.get(at, 1.0) for at in range(entries)]


def _verdict(difference: float, p: float, error: float) -> str:
    return "tie" if p > error else "better" if difference > 0 else "worse"


def _mcnemar(own: Floats, others: Floats) -> float | None:
    if not np.isin([own, others], [0, 1]).all():
        return None
    return statistics.mcnemar(int(np.sum(own > others)), int(np.sum(others > own)))


def notes(found: Comparison) -> list[str]:
    """What a reader should know before believing the ranking."""
    said, metric = [], found.metrics[0]
    best, count = found.entries[0], len(found.entries)
    if count > 1:
        tested = [value for run in best.runs if (value := run.of_test(metric)) is not None]
        again = f"{typed('evaluate')} run={shlex.quote(str(best.runs[0].folder))} data.test=FILE"
        said.append(
            f"{best.name} is the best of {count} on these rows, and was chosen by them: its score there is biased "
            f"{'downward' if found.lower_is_better else 'upward'}; "
            + (f"on the test rows it has {fmean(tested):.4f}" if tested else f"score it on other rows: {again}")
        )
        if all(len(entry.runs) == 1 for entry in found.entries):
            said.append(
                "Intervals and verdicts are about these runs on other images; how much a run varies with its seed is "
                "not in them: sweep trainer.seed=0,1,2 beside the other keys to see it"
            )
    if count * (count - 1) / 2 > MOST_DRAWS * (1 - found.confidence):
        said.append(f"With {count} entries no difference can be told from chance; compare fewer")
    if getattr(METRICS.get(metric), "total", None) is not None:
        said.append(
            f"{metric} is compared by the mean of the rows' own scores; evaluations report it of all rows together"
        )
    cells = [row[0] for row in found.rows]
    if not any(cells):
        said.append("The rows name no images: each is taken as independent of the others")
    return said


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
