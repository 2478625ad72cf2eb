"""The metrics by name, and those of the user by their dotted path; what a metric gives for many rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics.texts import anls, exact_match, relaxed_accuracy, relaxed_accuracy_lenient, rouge_l, token_f1
from vlmtune.metrics.vqa import vqa_accuracy, vqa_accuracy_lenient

Metric = Callable[[str, Sequence[str]], float]


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "vqa_accuracy_lenient": vqa_accuracy_lenient,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "relaxed_accuracy_lenient": relaxed_accuracy_lenient,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


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


def score(
    metrics: Mapping[str, Metric], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Apply each metric to each row: the means over all rows, and the rows' own scores in order.

    There is at least one row, and each row has at least one reference.
    """
    rows = [
        {name: float(metric(prediction, answers)) for name, metric in metrics.items()}
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in metrics}, rows
