"""Metrics that bear a published name give the published values.

The values in VQA, ANLS and RELAXED were computed by running the published code on these cases: vqaEval.py of
GT-Vision-Lab/VQA, infographicsvqa_eval.py of rrc.cvc.uab.es and relaxed_correctness of google-research/pix2struct.
SQuAD's F1 and rouge_score's ROUGE-L are restated below from their descriptions.
"""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest

from vlmtune.metrics import (
    anls,
    exact_match,
    relaxed_accuracy,
    relaxed_accuracy_lenient,
    rouge_l,
    token_f1,
    vqa_accuracy,
    vqa_accuracy_lenient,
)

# prediction, an answer that four of ten people gave, published accuracy
VQA: list[tuple[str, str, float]] = [
    ("4 p.m.", "4 pm", 1.0),
    ("5:00 a.m.", "5:00 am", 1.0),
    ("u.s.", "us", 1.0),
    ("U.S.A.", "usa", 1.0),
    ("washington d.c.", "washington dc", 1.0),
    ("j.p. morgan", "jp morgan", 1.0),
    ("st. louis", "st louis", 1.0),
    ("3.5", "3.5", 1.0),
    ("3.5.", "3.5", 1.0),
    (".5", "5", 0.0),
    (".5", ".5", 1.0),
    ("no. 5", "no 5", 1.0),
    ("no.5", "no.5", 1.0),
    ("no.5", "no5", 0.0),
    ("5%", "5", 0.0),
    ("5%", "5%", 1.0),
    ("$5.00", "5.00", 0.0),
    ("$5.00", "$5.00", 1.0),
    ("it's", "its", 0.0),
    ("its", "its", 1.0),
    ("it's", "it's", 1.0),
    ("dont", "don't", 1.0),
    ("don't", "dont", 0.0),
    ("don't", "don't", 1.0),
    ("oclock", "o'clock", 1.0),
    ("10 oclock", "10 o'clock", 1.0),
    ("youre", "you're", 1.0),
    ("lets", "let's", 0.0),
    ("somebody'd", "somebodyd", 1.0),
    ("wheres", "where's", 1.0),
    ("Im here", "i'm here", 0.0),
    ("twas", "'twas", 1.0),
    ("we", "we", 1.0),
    ("wont", "won't", 1.0),
    ("cant", "can't", 1.0),
    ("two", "2", 1.0),
    ("Two.", "2", 1.0),
    ("ten", "10", 1.0),
    ("eleven", "11", 0.0),
    ("none", "0", 1.0),
    ("twenty one", "20 1", 0.0),
    ("twenty one", "twenty 1", 1.0),
    ("twenty-one", "twenty 1", 1.0),
    ("The cat", "cat", 1.0),
    ("a", "a", 0.0),
    ("a", "x", 0.0),
    ("an apple a day", "apple day", 1.0),
    ("theatre", "theatre", 1.0),
    ("cat the", "cat", 1.0),
    ("1,000", "1000", 1.0),
    ("1, 000", "1 000", 1.0),
    ("1,000 - 2", "1000  2", 0.0),
    ("1,000-2", "10002", 1.0),
    ("red, white", "red white", 1.0),
    ("red,white", "red white", 1.0),
    ("red,white", "redwhite", 0.0),
    ("black/white", "black white", 1.0),
    ("black / white", "black white", 1.0),
    ("ping-pong", "ping pong", 1.0),
    ("ping -pong", "ping pong", 1.0),
    ("ping - pong", "ping pong", 1.0),
    ("wow!", "wow", 1.0),
    ("wow! ok", "wow ok", 1.0),
    ("yes?", "yes", 1.0),
    ("(blue)", "blue", 1.0),
    ("a [b]", "b", 1.0),
    ("c++", "c", 1.0),
    ("rock & roll", "rock & roll", 1.0),
    ("7:30", "7:30", 1.0),
    ("7:30", "730", 0.0),
    ("no\nyes", "no yes", 1.0),
    ("no\tyes", "no yes", 1.0),
    ("  yes  ", "yes", 1.0),
    ("é.", "é", 1.0),
    ("#5", "#5", 1.0),
    ("#5", "5", 0.0),
    ("dog*", "dog", 0.0),
    ("snake_case", "snake case", 1.0),
    ("e@mail", "e mail", 1.0),
    ("a=b", "b", 1.0),
    ('"stop"', "stop", 1.0),
    ("`x`", "x", 1.0),
    ("stop;go", "stop go", 1.0),
    ("<3", "3", 1.0),
]

# prediction, how many people gave which answer, published accuracy
VQA_PEOPLE: list[tuple[str, dict[str, int], float]] = [
    ("cat", {"dog": 10}, 0.0),
    ("cat", {"cat": 1, "dog": 9}, 0.3),
    ("cat", {"cat": 2, "dog": 8}, 0.6),
    ("cat", {"cat": 3, "dog": 7}, 0.9),
    ("cat", {"cat": 4, "dog": 6}, 1.0),
    ("cat", {"cat": 10}, 1.0),
    ("2 cats", {"2 cats": 10}, 1.0),
    ("two cats", {"two cats": 10}, 0.0),
    ("The cat", {"The cat": 10}, 0.0),
    ("4 p.m.", {"4 p.m.": 10}, 0.0),
    ("4 p.m.", {"4 p.m.": 9, "4 pm": 1}, 1.0),
    ("Cat", {"Cat": 9, "dog": 1}, 0.0),
    ("cat", {"Cat": 9, "dog": 1}, 0.0),
    ("red-brown", {"red-brown": 5, "brown": 5}, 1.0),
    ("yes", {"yes": 2, "no": 2}, 0.5),
    ("yes", {"yes": 3, "no": 1}, 0.75),
    ("yes", {"yes": 4}, 1.0),
    ("yes", {"yes": 2, "no": 3}, 0.5333),
    ("ok", {"ok!": 3, "no": 7}, 0.0),
    ("two", {"two": 3, "2": 7}, 1.0),
]

ANLS: list[tuple[str, list[str], float]] = [
    ("kitten", ["sitting"], 0.5714),
    ("kitten", ["sitting", "mitten"], 0.8333),
    ("ab", ["ac"], 0.5),
    ("abc", ["abd"], 0.6667),
    ("abcd", ["abxy"], 0.5),
    ("abcd", ["axyz"], 0.0),
    ("INV-001", ["inv-001"], 1.0),
    ("Inv 001", ["inv  001"], 1.0),
    ("  a  ", ["a"], 1.0),
    ("a", ["a  "], 1.0),
    ("a b", ["a   b"], 1.0),
    ("a\nb", ["a b"], 1.0),
    ("a\tb", ["a b"], 1.0),
    ("", [""], 1.0),
    ("", ["a"], 0.0),
    ("a", [""], 0.0),
    ("", ["  "], 1.0),
    ("   ", [""], 1.0),
    ("ß", ["ss"], 0.0),
    ("straße", ["strasse"], 0.7143),
    ("ﬁle", ["file"], 0.5),
    ("1980", ["1981"], 0.75),
    ("12/15/89", ["12/15/88"], 0.875),
    ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
    ("Dear dr. Lobo", ["Dear Dr. Lobo", "Dr. Lobo"], 1.0),
    ("cat.", ["cat"], 0.75),
    ("cat", ["cat."], 0.75),
    ("the cat", ["cat"], 0.0),
    ("a cat", ["cat"], 0.6),
    ("$1,234", ["1234"], 0.6667),
    ("5%", ["5"], 0.5),
    ("10", ["1"], 0.5),
    ("100", ["1"], 0.0),
    ("yes", ["no"], 0.0),
    ("yes", ["no", "yes"], 1.0),
    ("yes", ["YES"], 1.0),
    ("é", ["e"], 0.0),
    ("é", ["é"], 1.0),
    ("é", ["É"], 1.0),
    ("é", ["é"], 0.0),
    ("東京", ["東京都"], 0.6667),
    ("東京", ["京都"], 0.0),
    ("abcdef", ["abcdef ghij"], 0.5455),
    ("abcdefg", ["abcdef ghijkl"], 0.5385),
    ("hello world", ["helloworld"], 0.9091),
    ("hello  world", ["hello world"], 1.0),
    ("New York City", ["new york"], 0.6154),
    ("york", ["new york"], 0.5),
    ("new york", ["york new"], 0.0),
    ("aaaa", ["aabb"], 0.5),
    ("aaaa", ["abbb"], 0.0),
    ("aaaaa", ["aabbb"], 0.0),
    ("aaaaa", ["aaabb"], 0.6),
    ("İ", ["i"], 0.0),
    ("2.50", ["2.5"], 0.75),
    ("2,50", ["2.50"], 0.75),
    ("ITC Limited", ["itc limited", "ITC Limited"], 1.0),
    (
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        ["xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxy"],
        0.99,
    ),
    ("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", ["yyyyyyyyyyyyyyyyyyyyyyyyyxxxxxxxxxxxxxxxxxxxxxxxxx"], 0.5),
    ("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", ["yyyyyyyyyyyyyyyyyyyyyyyyyyxxxxxxxxxxxxxxxxxxxxxxxx"], 0.0),
]

RELAXED: list[tuple[str, str, float]] = [
    ("105", "100", 1.0),
    ("105.1", "100", 0.0),
    ("95", "100", 1.0),
    ("94.9", "100", 0.0),
    ("-95", "-100", 1.0),
    ("95", "-100", 0.0),
    ("1,234", "1234", 0.0),
    ("1,234", "1,234", 1.0),
    ("1234", "1234", 1.0),
    ("1_000", "1000", 1.0),
    ("1e3", "1000", 1.0),
    ("1e3.", "1000", 0.0),
    ("12%", "12", 0.0),
    ("12%", "0.12", 1.0),
    ("0.12", "12%", 1.0),
    ("12%", "12%", 1.0),
    ("12.5%", "12%", 1.0),
    ("12.7%", "12%", 0.0),
    ("12 %", "12%", 1.0),
    ("12%%", "12%", 1.0),
    ("%", "%", 1.0),
    ("%", "", 0.0),
    ("0", "0", 1.0),
    ("0", "0.0", 0.0),
    ("0.0", "0.0", 1.0),
    ("0%", "0", 0.0),
    ("0.001", "0", 0.0),
    ("5", "0", 0.0),
    ("nan", "100", 0.0),
    ("nan", "nan", 0.0),
    ("NaN", "nan", 0.0),
    ("inf", "inf", 0.0),
    ("inf", "5", 0.0),
    ("5", "inf", 0.0),
    ("Infinity", "infinity", 0.0),
    ("2010", "2015", 1.0),
    ("2015", "2010", 1.0),
    ("1900", "2015", 0.0),
    ("Blue", "blue", 1.0),
    ("Blue", "blue.", 0.0),
    ("blue ", "blue", 0.0),
    ("dark blue", "Dark Blue", 1.0),
    ("dark  blue", "dark blue", 0.0),
    ("Yes", "yes", 1.0),
    ("yes", "no", 0.0),
    ("", "5", 0.0),
    ("", "", 1.0),
    ("5", "", 0.0),
    (" 5", "5", 1.0),
    ("5\n", "5", 1.0),
    ("$5", "5", 0.0),
    ("$5", "$5", 1.0),
    ("5 million", "5", 0.0),
    ("+5", "5", 1.0),
    ("5.", "5", 1.0),
    (".5", "0.5", 1.0),
    ("0x10", "16", 0.0),
    ("٣", "3", 1.0),
    ("1/2", "0.5", 0.0),
    ("1e400", "5", 0.0),
    ("3.14", "3", 1.0),
    ("3.16", "3", 0.0),
    ("[1, 2]", "[1, 2]", 1.0),
    ("[1,2]", "[1, 2]", 0.0),
    ("5", "five", 0.0),
    ("ÄPFEL", "äpfel", 1.0),
]

# Texts for the metrics that compare words; each is compared with the one after it and with the one three places on.
TEXTS = [
    "a dog runs on the beach",
    "the beach runs on a dog",
    "Dog on beach.",
    "",
    "the",
    "The U.S.A.",
    "usa",
    "don't",
    "dont do that",
    "well-known fact",
    "wellknown fact",
    "It costs $5.00, or 5.00!",
    "it costs 500",
    "(a) an apple",
    "apple apple apple",
    "apple",
    "  spaced \t out\nwords ",
    "spaced out words",
    "theatre a theatre",
    "THEATRE",
    "one two three four",
    "four three two one",
    "2,000 people",
    "2000 people",
    "e-mail me @ home",
    "email me at home",
    "?!",
    "no",
]
PAIRS = [(left, TEXTS[(at + step) % len(TEXTS)]) for at, left in enumerate(TEXTS) for step in (1, 3)]


def test_there_are_fifty_cases_and_more_for_each_published_metric() -> None:
    assert min(map(len, (VQA, ANLS, RELAXED, PAIRS))) >= 50


@pytest.mark.parametrize(("prediction", "reference", "expected"), VQA)
def test_vqa_accuracy_processes_answers_as_published(prediction: str, reference: str, expected: float) -> None:
    assert vqa_accuracy(prediction, [reference] * 4 + ["zebra"] * 6) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("prediction", "people", "expected"), VQA_PEOPLE)
def test_vqa_accuracy_counts_people_as_published(prediction: str, people: dict[str, int], expected: float) -> None:
    """References are processed only where they differ, and never lose their case: that code's own ways."""
    answers = [answer for answer, count in people.items() for _ in range(count)]
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-4)


def test_vqa_accuracy_drops_32_periods_at_most() -> None:
    """The published code hands a flag of `re` to the parameter that counts replacements."""
    references = ["a" * 33] * 4 + ["x"] * 6
    assert vqa_accuracy("a." * 32 + "a", references) == 1
    assert vqa_accuracy("a." * 33, references) == 0


def test_the_lenient_vqa_accuracy_processes_both_sides() -> None:
    for prediction, reference in [
        ("the cat", "The Cat"),
        ("2 dogs", "Two dogs."),
        ("4 p.m.", "4 p.m."),
        ("dont", "dont"),
    ]:
        assert vqa_accuracy_lenient(prediction, [reference] * 10) == 1
        assert vqa_accuracy(prediction, [reference] * 10) == 0
    assert vqa_accuracy_lenient("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx(0.6)


def test_vqa_accuracy_of_few_references_processes_both_sides() -> None:
    assert vqa_accuracy("U.S.A.", ["u.s.a."]) == 1
    assert vqa_accuracy("Two", ["two", "the two", "3"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("prediction", "references", "expected"), ANLS)
def test_anls_is_that_of_the_leaderboards_script(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("prediction", "reference", "expected"), RELAXED)
def test_relaxed_accuracy_is_the_published_code(prediction: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == expected
    assert relaxed_accuracy(prediction, ["zebra", reference]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "published", "lenient"),
    [
        ("1,234", "1234", 0, 1),
        ("1,23", "123", 0, 0),
        ("12%", "12", 0, 1),
        ("12%", "0.12", 1, 1),
        ("12%", "0.12%", 0, 0),
        ("0", "0.0", 0, 1),
        ("0.001", "0", 0, 0),
        ("1e3.", "1000", 0, 1),
        ("Blue", "blue.", 0, 1),
        ("105.1", "100", 0, 0),
        ("nan", "100", 0, 0),
    ],
)
def test_the_lenient_relaxed_accuracy(prediction: str, reference: str, published: float, lenient: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == published
    assert relaxed_accuracy_lenient(prediction, [reference]) == lenient


def squad_f1(prediction: str, reference: str) -> float:
    """SQuAD 2.0: lower case, ASCII punctuation deleted, articles out, split at whitespace."""

    def tokens(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word]

    left, right = tokens(prediction), tokens(reference)
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(left), shared / len(right)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_token_f1_is_squads(prediction: str, reference: str) -> None:
    assert token_f1(prediction, [reference]) == pytest.approx(squad_f1(prediction, reference))


def test_token_f1_leaves_references_without_words_out_where_others_have_some() -> None:
    """As SQuAD does: an answer of no words is not right because one of the references is an article."""
    assert token_f1("", ["the", "cat"]) == 0
    assert token_f1("", ["the", "?"]) == 1


def rouge_score_l(prediction: str, reference: str) -> float:
    """rouge_score's rougeL without stemming: words of a-z and 0-9, longest common subsequence, F-measure."""

    def longest(left: list[str], right: list[str]) -> int:
        table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    left, right = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (prediction, reference))
    if not left or not right:
        return 0.0
    common = longest(left, right)
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall) if common else 0.0


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_rouge_l_is_that_of_rouge_score(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, [reference]) == pytest.approx(rouge_score_l(prediction, reference))


def test_rouge_l_differs_from_rouge_score_where_its_docstring_says() -> None:
    assert rouge_l("", [""]) == 1
    assert rouge_l("два кота", ["два кота"]) == 1 != rouge_score_l("два кота", "два кота")
    assert rouge_l("snake_case", ["snake case"]) == 0 != rouge_score_l("snake_case", "snake case")


@pytest.mark.parametrize(("prediction", "reference", "ours"), [("the cat", "cat", 0), ("-5", "5", 0), ("3.5", "35", 0)])
def test_exact_match_differs_from_squads_where_its_docstring_says(prediction: str, reference: str, ours: float) -> None:
    assert exact_match(prediction, [reference]) == ours
    assert squad_f1(prediction, reference) == 1
