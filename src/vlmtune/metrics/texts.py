"""How good one answer is: functions of a prediction and its reference answers, from 0 (wrong) to 1 (right).

This module is imported while a config is checked, so it imports nothing heavy.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from vlmtune.metrics.distance import levenshtein

TRAILING_PUNCTUATION = ".,;:!?。"
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
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
    """1 if the prediction equals one of the references after `normalise`; else 0.

    Our own rule. SQuAD's exact match also drops articles and all ASCII punctuation, so that it takes `the 3.5` for `35`
    and `-5` for `5`; here those differ, and letters that only look different in Unicode (`é` in one or two characters)
    are equal.
    """
    return float(normalise(prediction) in map(normalise, references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity for document questions: forgives slips of reading, up to half the text.

    1 - distance / length, best over the references; 0 where that is below 0.5. Equal to the evaluation script of the
    DocVQA and InfographicVQA leaderboards (rrc.cvc.uab.es, infographicsvqa_eval.py), which is known for three choices:
    case and runs of whitespace don't count in the distance, the length is that of the longer text as it was given, its
    surplus whitespace included, and a similarity of exactly 0.5 is kept. The paper's formula (Biten et al. 2019,
    arXiv:1905.13648) gives 0 at exactly 0.5 and says nothing of case or whitespace.
    """
    return _best(_similarity, prediction, references)


def _similarity(prediction: str, reference: str) -> float:
    left, right = (" ".join(text.lower().split()) for text in (prediction, reference))
    longer = max(len(prediction.upper()), len(reference.upper()))  # `ß` counts twice, as in the script
    similarity = 1 - levenshtein(left, right) / longer if longer else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Chart questions: 1 if a number is within 5 % of a reference, or the texts are equal but for their case; else 0.

    Equal to the code that ChartQA's numbers are computed with (relaxed_correctness in github.com/google-research/
    pix2struct, pix2struct/metrics.py), best over the references:

    - A number is what Python's `float` reads, with `%` at its end for hundredths: `12%` is 0.12 and differs from `12`;
      `1,200` and `$5` are texts.
    - A reference of 0 is compared as text, so `0` and `0.0` differ. The tolerance holds for years too.
    - Nothing is stripped: `blue.` and `blue` differ.

    `relaxed_accuracy_lenient` forgives these. Source: Methani et al. 2020 (PlotQA), arXiv:1909.00997; Masry et al. 2022
    (ChartQA), arXiv:2203.10244.
    """
    return _best(_within_tolerance, prediction, references)


def _within_tolerance(prediction: str, reference: str) -> float:
    predicted, expected = _float(prediction), _float(reference)
    if predicted is None or not expected:
        return float(prediction.lower() == reference.lower())
    return float(abs(predicted - expected) / abs(expected) <= RELATIVE_TOLERANCE)


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy_lenient(prediction: str, references: Sequence[str]) -> float:
    """`relaxed_accuracy` for numbers as people write them; not a published metric.

    `1,200` is read as 1200. A percent sign on one side only may stand for either reading: `12%` agrees with 12 and with
    0.12. `0` equals `0.0`. Texts are compared as `exact_match` does.
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
    """Harmonic mean of precision and recall of words, order ignored; best over the references.

    Equal to the F1 of SQuAD 2.0's evaluation (evaluate-v2.0.py): texts in lower case, ASCII punctuation deleted (`dont`
    for `don't`), articles left out, words split at whitespace. A reference without a word counts only where all are so.

    Source: Rajpurkar et al. 2016 and 2018, arXiv:1606.05250, arXiv:1806.03822.
    """

    def f1(left: str, right: str) -> float:
        a, b = _squad_words(left), _squad_words(right)
        return _f1(sum((Counter(a) & Counter(b)).values()), len(a), len(b))

    return _best(f1, prediction, [text for text in references if _squad_words(text)] or [""])


def _squad_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(ASCII_PUNCTUATION)).split()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L: harmonic mean of precision and recall of the longest common subsequence of words; best over references.

    Equal weights (beta = 1), no stemming. On English text equal to the package rouge_score without its stemmer, but for
    the underscore, which joins words here, and for two texts without a word, which score 1 here and 0 there. That
    package drops all letters but a to z, so that other scripts score 0; here they count.

    Source: Lin 2004, https://aclanthology.org/W04-1013.
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


def _best(compare: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    return max(compare(prediction, reference) for reference in references)
