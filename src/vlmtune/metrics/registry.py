"""The metrics by name, and those of the user by their dotted path; what a metric gives for many rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics.boxes import box_f1, box_iou, no_boxes
from vlmtune.metrics.captions import bleu_4, cider_d
from vlmtune.metrics.corpus import Corpus, References, Texts
from vlmtune.metrics.reading import cer, wer
from vlmtune.metrics.texts import anls, exact_match, relaxed_accuracy, relaxed_accuracy_lenient, rouge_l, token_f1
from vlmtune.metrics.trees import anls_star, field_f1, no_object
from vlmtune.metrics.vqa import vqa_accuracy, vqa_accuracy_lenient

Metric = Callable[[str, Sequence[str]], float] | Corpus


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "vqa_accuracy_lenient": vqa_accuracy_lenient,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "relaxed_accuracy_lenient": relaxed_accuracy_lenient,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "cider_d": cider_d,
    "bleu_4": bleu_4,
    "cer": cer,
    "wer": wer,
    "anls_star": anls_star,
    "field_f1": field_f1,
    "box_iou": box_iou,
    "box_f1": box_f1,
}
PERFECT = {"cider_d": 10.0}
"""The score of a perfect answer where it is not 1, or 0 where lower is better."""
FITS: dict[str, Callable[[str], str | None]] = {"field_f1": no_object, "box_iou": no_boxes, "box_f1": no_boxes}
"""Why a metric can't score a reference; those that are not here take any text."""


def lower_is_better(name: str) -> bool:
    """Of `loss`, or a metric of `task.metrics`; with its split (`eval/cer`) or without.

    A user's function says so by an attribute: `def seconds_off(...): ...; seconds_off.lower_is_better = True`. One that
    can't be imported here counts as one where higher is better.
    """
    own = name.rpartition("/")[2]
    if own == "loss":
        return True
    try:
        return bool(getattr(resolve([own])[own], "lower_is_better", False))
    except ConfigError:
        return False


def averaged(names: Sequence[str]) -> list[str]:
    """Those of these metrics whose value is the mean of the rows' scores."""
    found = resolve(names)
    return [name for name in names if getattr(found[name], "total", None) is None]


def misfits(names: Sequence[str], references: Sequence[str]) -> list[str]:
    """Why these metrics can't score a row with these references."""
    found = [(name, text, FITS[name](text)) for name in names if name in FITS for text in references]
    return [f"{name} can't score the answer: {text[:60]!r} {why}" for name, text, why in found if why]


def resolve(names: Sequence[str]) -> dict[str, Metric]:
    """Find each metric by its name here, or by the dotted path of the user's own function (`package.module.function`).

    Raises ConfigError that lists every name that is neither.
    """
    found, problems = {}, []
    for name in names:
        try:
            found[name] = METRICS[name] if "." not in name else _own_function(name)
        except KeyError:
            problems.append(f"task.metrics: no metric {name}; {nearest(name, METRICS)}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _own_function(path: str) -> Metric:
    """Import a user's function. Any error of their module is theirs to read, so it becomes part of the message."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"task.metrics: {path}: importing {module_name} failed: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f"task.metrics: {path}: {module_name} has no function {name}; {nearest(name, functions)}")
    return function  # type: ignore[no-any-return]


def row_scores(metric: Metric, predictions: Texts, references: References) -> list[float]:
    """The score of each row; each has at least one reference."""
    if isinstance(metric, Corpus):
        return metric.rows(predictions, references)
    return [float(metric(*row)) for row in zip(predictions, references, strict=True)]


def value_of(metric: Metric, predictions: Texts, references: References, scores: Sequence[float]) -> float:
    """A metric's value for some rows, of which there is at least one. `scores`: the rows' own, as `row_scores` gave
    them for these and perhaps more rows.
    """
    if isinstance(metric, Corpus):
        return metric.of(predictions, references, scores)
    return sum(scores) / len(scores)


def score(
    metrics: Mapping[str, Metric], predictions: Texts, references: References
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Apply each metric: its value for all rows, and the rows' own scores in order.

    There is at least one row, and each row has at least one reference.
    """
    found = {name: row_scores(metric, predictions, references) for name, metric in metrics.items()}
    values = {name: value_of(metrics[name], predictions, references, scores) for name, scores in found.items()}
    return values, [{name: scores[row] for name, scores in found.items()} for row in range(len(predictions))]
