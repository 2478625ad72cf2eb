"""How good descriptions are, by the n-grams that they share with the references: CIDEr-D and BLEU-4."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from vlmtune.metrics.corpus import Corpus, References, Texts
from vlmtune.metrics.texts import words

LONGEST = 4
SIGMA = 6.0
Counts = Counter[tuple[str, ...]]
Vector = list[dict[tuple[str, ...], float]]


def ngrams(tokens: Sequence[str], length: int) -> Counts:
    return Counter(tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1))


# ---------------------------------------------------------------- CIDEr-D


def _cider_rows(predictions: Texts, references: References) -> list[float]:
    """CIDEr-D of each row, from 0 to 10: n-grams that few rows' references have weigh more.

    The weights come from the references of all rows given, so a row's score depends on the others, and is 0 where there
    are no others. On the same words equal to the published code (github.com/vrama91/cider) with the idf of the
    references. Published results split words with Stanford's PTB tokenizer; here `texts.words` does, so that scores
    differ slightly. Source: Vedantam et al. 2015, arXiv:1411.5726.
    """
    candidates = [_all_ngrams(text) for text in predictions]
    wanted = [[_all_ngrams(text) for text in texts] for texts in references]
    rows_with: Counts = Counter(gram for row in wanted for gram in set().union(*row))
    idf = {gram: math.log(len(wanted) / count) for gram, count in rows_with.items()}
    unseen = math.log(len(wanted))

    def vector(counts: Counts) -> Vector:
        found: Vector = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * idf.get(gram, unseen)
        return found

    return [
        sum(_likeness(own, text, vector(own), vector(text)) for text in texts) / len(texts)
        for own, texts in zip(candidates, wanted, strict=True)
    ]


def _all_ngrams(text: str) -> Counts:
    tokens = words(text)
    return sum((ngrams(tokens, length) for length in range(1, LONGEST + 1)), Counter())


def _likeness(left: Counts, right: Counts, of_left: Vector, of_right: Vector) -> float:
    """Ten times the mean over the lengths of n-grams. The published code measures a text's length in bigrams."""
    apart = sum(count * (len(gram) == 2) for gram, count in (left - right).items())
    apart -= sum(count * (len(gram) == 2) for gram, count in (right - left).items())
    found = 0.0
    for own, other in zip(of_left, of_right, strict=True):
        norms = math.sqrt(sum(value**2 for value in own.values()) * sum(value**2 for value in other.values()))
        shared = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
        found += shared / norms if norms else 0.0
    return 10 * found / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))


# ---------------------------------------------------------------- BLEU-4

ESCAPED = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def bleu_tokens(text: str) -> list[str]:
    """Lower-case words and punctuation as the tokenizer 13a of mteval-v13a.pl and sacrebleu has them."""
    line = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for written, meant in ESCAPED:
        line = line.replace(written, meant)
    line = f" {line} "
    for pattern, split in SPLITS:
        line = pattern.sub(split, line)
    return line.split()


def _bleu_counts(prediction: str, references: Sequence[str]) -> list[int]:
    """Length of the prediction and of the reference closest to it, then for each n the shared n-grams and all."""
    own, wanted = bleu_tokens(prediction), [bleu_tokens(text) for text in references]
    closest = min((len(tokens) for tokens in wanted), key=lambda length: (abs(length - len(own)), length))
    found = [len(own), closest]
    for length in range(1, LONGEST + 1):
        most: Counts = Counter()
        for tokens in wanted:
            most |= ngrams(tokens, length)
        found += [(ngrams(own, length) & most).total(), max(len(own) - length + 1, 0)]
    return found


def _bleu(counts: Sequence[int], *, one_row: bool) -> float:
    """`one_row`: only as many lengths of n-grams count as the row is long (sacrebleu's effective order)."""
    own, wanted, *pairs = counts
    logs, halved = [], 1.0
    for shared, count in zip(pairs[::2], pairs[1::2], strict=True):
        if not count:
            if one_row:
                break
            return 0.0
        if not shared:
            halved /= 2
        logs.append(math.log((shared or halved) / count))
    if not logs or not any(pairs[::2]):
        return 0.0
    return math.exp(min(0.0, 1 - wanted / own) + sum(logs) / len(logs))


def _bleu_rows(predictions: Texts, references: References) -> list[float]:
    return [_bleu(_bleu_counts(*row), one_row=True) for row in zip(predictions, references, strict=True)]


def _bleu_total(predictions: Texts, references: References) -> float:
    """BLEU-4 of all rows together, from 0 to 1: n-grams are counted over all rows.

    Equal to sacrebleu (`case:lc|tok:13a|smooth:exp`) divided by 100; a row's own score is its sentence BLEU with
    effective order. Source: Papineni et al. 2002, https://aclanthology.org/P02-1040; Post 2018, arXiv:1804.08771.
    """
    counts = [_bleu_counts(*row) for row in zip(predictions, references, strict=True)]
    return _bleu([sum(column) for column in zip(*counts, strict=True)], one_row=False)


cider_d = Corpus(_cider_rows, row_by_row=False)
bleu_4 = Corpus(_bleu_rows, _bleu_total)
