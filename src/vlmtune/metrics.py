"""How good one answer is: functions of a prediction and its reference answers, from 0 (wrong) to 1 (right).

This module is imported while a config is checked, so it imports the standard library alone.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from vlmtune.errors import ConfigError, nearest

Metric = Callable[[str, Sequence[str]], float]

TRAILING_PUNCTUATION = ".,;:!?。"
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(e[+-]?\d+)?")
ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


def normalise(text: str) -> str:
    """Drop what doesn't change an answer: case, surplus whitespace, punctuation at the end.

    >>> normalise("  Dark   Blue. ")
    'dark blue'
    """
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return plain.rstrip(TRAILING_PUNCTUATION + " ") or plain


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", normalise(text))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals one of the references, both normalised; else 0."""
    return float(normalise(prediction) in map(normalise, references))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA v2's accuracy: an answer is right when three of the people asked gave it, and in part when fewer did.

    One person is left out in turn and the scores min(matches / 3, 1) against the others are averaged. The usual code
    does that with any number of references, and so a single reference always scores 0 and two or three never score 1.
    Here the divisor is at most the number of people left: three or more of four or more references count as published,
    three references score matches / 3, two score matches / 2, and one is a normalised comparison.

    Source: Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837.
    """
    answer = _vqa_normalise(prediction)
    people = len(references)
    matches = sum(answer == _vqa_normalise(reference) for reference in references)
    if people < 2:
        return float(matches)
    enough = min(3, people - 1)
    left_out_agrees = min((matches - 1) / enough, 1) * matches
    left_out_differs = min(matches / enough, 1) * (people - matches)
    return (left_out_agrees + left_out_differs) / people


def _vqa_normalise(text: str) -> str:
    """Apply VQA's rules to an answer: no articles, digits for number words, no punctuation but decimal points."""
    text = re.sub(r"(?<=\d),(?=\d)|['\u2019`]", "", normalise(text))
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", " ", text)
    return " ".join(DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity for document questions: forgives slips of reading, up to half the text.

    1 - distance / length of the longer text, best over the references; 0 from a distance of half the text on.

    Source: Biten et al. 2019, arXiv:1905.13648.
    """
    return _best(_similarity, normalise(prediction), map(normalise, references))


def _similarity(left: str, right: str) -> float:
    longer = max(len(left), len(right))
    distance = _levenshtein(left, right) / longer if longer else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _levenshtein(left: str, right: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn `left` into `right`."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        above = enumerate(pairwise(row), start=1)
        row = [i]
        for j, (diagonal, up) in above:
            row.append(min(up + 1, row[-1] + 1, diagonal + (a != right[j - 1])))
    return row[-1]


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Chart questions: 1 if a number is within 5 % of a reference, or another text equals it normalised; else 0.

    `1,200` is read as 1200. A percent sign on one side only may stand for either reading: `12%` agrees with 12 and with
    0.12. The tolerance holds for years too (2010 passes for 2015), as in the published metric.

    Source: Methani et al. 2020 (PlotQA), arXiv:1909.00997; Masry et al. 2022 (ChartQA), arXiv:2203.10244.
    """
    return _best(_nearly_equal, prediction, references)


def _nearly_equal(prediction: str, reference: str) -> float:
    predicted, expected = _number(prediction), _number(reference)
    if predicted is None or expected is None:
        return exact_match(prediction, [reference])
    scales = [1.0] if ("%" in prediction) == ("%" in reference) else [1.0, 100.0 if "%" in reference else 0.01]
    return float(any(abs(predicted * scale - expected) <= RELATIVE_TOLERANCE * abs(expected) for scale in scales))


def _number(text: str) -> float | None:
    """The number that a text consists of, its percent sign dropped; None for any other text."""
    plain = normalise(text).removesuffix("%").strip()
    return float(plain.replace(",", "")) if re.search(r"\d", plain) and NUMBER.fullmatch(plain) else None


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, articles left out, order ignored; best over the references.

    Source: Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250.
    """

    def f1(left: str, right: str) -> float:
        a, b = ([word for word in words(text) if word not in ARTICLES] for text in (left, right))
        return _f1(sum((Counter(a) & Counter(b)).values()), len(a), len(b))

    return _best(f1, prediction, references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L: harmonic mean of precision and recall of the longest common subsequence of words; best over references.

    Source: Lin 2004, https://aclanthology.org/W04-1013; equal weights (beta = 1), no stemming.
    """

    def f1(left: str, right: str) -> float:
        a, b = words(left), words(right)
        return _f1(_common_subsequence(a, b), len(a), len(b))

    return _best(f1, prediction, references)


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest sequence of words that both texts contain in order."""
    row = [0] * (len(right) + 1)
    for a in left:
        above = pairwise(row)
        row = [0]
        for b, (diagonal, up) in zip(right, above, strict=True):
            row.append(diagonal + 1 if a == b else max(up, row[-1]))
    return row[-1]


def _f1(shared: int, predicted: int, expected: int) -> float:
    """Two empty texts agree; otherwise 2 * shared / (predicted + expected), which is the harmonic mean."""
    return 2 * shared / (predicted + expected) if predicted + expected else 1.0


def _best(compare: Callable[[str, str], float], prediction: str, references: Sequence[str] | map[str]) -> float:
    return max(compare(prediction, reference) for reference in references)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
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
