"""The metrics of many rows, and those of JSON and boxes, give what their reference implementations give.

sacrebleu, jiwer, anls-star and scipy are asked themselves. CIDEr-D's values were computed by `cider_d` of aac-metrics
0.6.0, which is the published code without Java, on the same words.
"""

from __future__ import annotations

import json
import random
import warnings
from typing import Any

import jiwer
import numpy as np
import pytest
import sacrebleu
from anls_star import anls_score
from scipy.optimize import linear_sum_assignment

from vlmtune.metrics import METRICS, lower_is_better, misfits, resolve, row_scores, score, value_of
from vlmtune.metrics.boxes import boxes, overlap
from vlmtune.metrics.captions import bleu_4, cider_d
from vlmtune.metrics.distance import best_pairs, levenshtein
from vlmtune.metrics.trees import anls_star

WORDS = ["a", "dog", "runs", "on", "the", "beach", ",", "two", "big", "Cats", "sit", "3.5", "well-known", "red"]


def captions(rng: random.Random, count: int, least: int = 0) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(least, 9))) for _ in range(count)]


def test_bleu_is_that_of_sacrebleu() -> None:
    rng = random.Random(0)
    for _ in range(60):
        rows, answers = rng.randint(1, 6), rng.randint(1, 3)
        found, wanted = captions(rng, rows), [captions(rng, answers, 1) for _ in range(rows)]
        own = bleu_4.rows(found, wanted)
        theirs = [sacrebleu.sentence_bleu(*row, lowercase=True).score for row in zip(found, wanted, strict=True)]
        assert own == pytest.approx([value / 100 for value in theirs])
        together = sacrebleu.corpus_bleu(found, [list(texts) for texts in zip(*wanted, strict=True)], lowercase=True)
        assert score({"bleu_4": bleu_4}, found, wanted)[0]["bleu_4"] == pytest.approx(together.score / 100)


CIDER = [
    (
        "a dog runs on the beach",
        ["a dog runs along the beach", "a brown dog is running on the beach"],
        3.2482905082669546,
    ),
    ("two cats sit on a red chair", ["two cats on a red chair", "cats sit on the chair"], 4.614975619653842),
    ("a man rides a horse", ["a man is riding a brown horse"], 1.975710348690738),
    ("a dog on a chair", ["a dog sits on the red chair", "a dog on a chair", "the dog"], 4.289118286688318),
]


def test_cider_d_is_that_of_the_published_code() -> None:
    found, wanted, values = ([row[part] for row in CIDER] for part in range(3))
    means, rows = score(resolve(["cider_d"]), found, wanted)
    assert [row["cider_d"] for row in rows] == pytest.approx(values)
    assert means["cider_d"] == pytest.approx(3.532023690824963)
    assert cider_d.rows(found[:2], wanted[:2]) != pytest.approx(values[:2]), "the other rows' references count"
    assert max(cider_d.rows([texts[0] for texts in wanted], [[texts[0]] for texts in wanted])) == pytest.approx(10)


def test_error_rates_are_those_of_jiwer() -> None:
    rng = random.Random(0)
    for _ in range(60):
        found, wanted = captions(rng, 3), captions(rng, 3, 1)
        means, rows = score(resolve(["cer", "wer"]), found, [[text] for text in wanted])
        assert means == {"cer": pytest.approx(jiwer.cer(wanted, found)), "wer": pytest.approx(jiwer.wer(wanted, found))}
        assert rows[0]["wer"] == pytest.approx(jiwer.wer(wanted[0], found[0]))
    assert METRICS["cer"]("line one\nline  two", ["line one line two"]) == 0
    assert METRICS["wer"]("", [" "]) == 0
    assert METRICS["cer"]("far too long", ["a", "far too lone"]) == pytest.approx(1 / 12)


def changed(rng: random.Random, tree: Any) -> Any:
    """A tree of another answer: values misread, left out, in another order."""
    if isinstance(tree, dict):
        return {key: changed(rng, value) for key, value in tree.items() if rng.random() < 0.8}
    if isinstance(tree, list):
        return rng.sample(kept := [changed(rng, value) for value in tree if rng.random() < 0.9], len(kept))
    return tree[:-2] + "?" if isinstance(tree, str) and rng.random() < 0.4 else tree


def test_anls_star_is_that_of_its_package() -> None:
    rng = random.Random(0)
    wanted = {
        "shop": "Blue Bakery",
        "items": [{"name": "rye bread", "price": 3.5}, {"name": "roll", "price": 1}, {"name": "cake", "tags": []}],
        "paid": True,
        "card": None,
        "note": "",
        "lines": [["first of all", "second"], ["third line"]],
    }
    seen = set()
    for _ in range(100):
        found = {**changed(rng, wanted), **rng.choice([{}, {"more": None}, {"more": "x"}, {"shop": ["Blue Bakery"]}])}
        own = anls_star(json.dumps(found), [json.dumps(wanted)])
        assert own == pytest.approx(anls_score(wanted, found))
        seen.add(own)
    assert len(seen) > 50
    with warnings.catch_warnings(action="ignore"):  # it says that it takes a list of texts for alternatives
        assert anls_star("kittens", ["sitting", "kitten"]) == pytest.approx(
            anls_score(["sitting", "kitten"], "kittens")
        )
    assert anls_star('```json\n{"a": 1}\n```', ['{"a": 1}']) == 1
    assert anls_star("no JSON", ['{"a": 1}']) == 0


def test_field_f1_counts_fields_over_all_rows() -> None:
    """As JSONParseEvaluator.cal_f1 of Donut: true positives over those and half of what is missing or surplus."""
    wanted = ['{"a": 1, "b": ["x", "y"]}', '{"a": 2}']
    means, rows = score(resolve(["field_f1"]), ['{"b": ["Y", "z"], "a": "1"}', "?"], [[text] for text in wanted])
    assert rows[0]["field_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert rows[1]["field_f1"] == 0
    assert means["field_f1"] == pytest.approx(2 / (2 + (1 + 1 + 1 + 1) / 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("[3, 4, 1, 2]", [(1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8]}]', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('```json\n{"cat": [[1, 2, 3, 4]]}\n```', [(1, 2, 3, 4)]),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>", [(1, 2, 3, 4)]),
        ("cat <loc0002><loc0001><loc0004><loc0003> ; dog", [(1, 2, 3, 4)]),
        ("The cat is at [0.1, 0.2, 0.3, 0.45].", [(0.1, 0.2, 0.3, 0.45)]),
        ("(0, 0), (0, 5)", [(0, 0, 0, 5)]),
        ("nowhere, 3 cats", []),
    ],
)
def test_boxes_are_read_as_models_write_them(text: str, expected: list[tuple[float, ...]]) -> None:
    assert boxes(text) == expected


def test_boxes_are_paired_so_that_they_fit_best() -> None:
    wanted = "[[0, 0, 10, 10], [20, 0, 30, 10]]"
    means, _ = score(resolve(["box_iou", "box_f1"]), ["[[20, 0, 30, 5], [0, 0, 10, 10], [50, 50, 60, 60]]"], [[wanted]])
    assert means == {"box_iou": pytest.approx((1 + 0.5) / 3), "box_f1": pytest.approx(2 * 2 / 5)}
    assert overlap((0, 0, 1, 1), (1, 1, 2, 2)) == overlap((0, 0, 0, 0), (1, 1, 1, 1)) == 0
    assert METRICS["box_f1"]("[]", ["[]"]) == METRICS["box_iou"]("[]", ["[]"]) == 1
    assert METRICS["box_iou"]("[0, 0, 10, 10]", ["[0, 0, 10, 20]", "[0, 0, 10, 11]"]) == pytest.approx(10 / 11)


def test_pairs_have_the_greatest_gain() -> None:
    rng = random.Random(0)
    for rows, columns in [(1, 1), (2, 5), (5, 2), (4, 4), (6, 6)] * 5:
        gains = [[rng.choice([0, 0.5, rng.random()]) for _ in range(columns)] for _ in range(rows)]
        found, (at, to) = best_pairs(gains), linear_sum_assignment(np.array(gains), maximize=True)
        assert sum(gains[row][column] for row, column in found) == pytest.approx(np.array(gains)[at, to].sum())
        assert len({row for row, _ in found}) == len({column for _, column in found}) == min(rows, columns)


def plain_levenshtein(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for a in left:
        above, row = row, [row[0] + 1]
        for place, b in enumerate(right):
            row.append(min(above[place + 1] + 1, row[-1] + 1, above[place] + (a != b)))
    return row[-1]


def test_levenshtein_is_that_of_the_plain_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left, right = ("".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(2))
        assert levenshtein(left, right) == plain_levenshtein(left, right)
    long = "".join(rng.choices("abcdef", k=20_000))  # a page of text, in a moment
    assert levenshtein(long, long[5:] + "xyz") <= 8


def test_where_lower_is_better(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "off_metrics.py").write_text(
        "def off(prediction, references):\n    return 0.0\ndef near(prediction, references):\n    return 1.0\n"
        "off.lower_is_better = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lower = ["loss", "eval/loss", "cer", "test/wer", "eval/off_metrics.off"]
    assert [name for name in [*lower, *METRICS, "off_metrics.near"] if lower_is_better(name)] == [*lower, "cer", "wer"]


def test_rows_have_scores_of_every_metric_and_their_own_value_together() -> None:
    """The value of all rows, from the scores of some: what slices need."""
    found, wanted = ["a red cat", "two dogs"], [["a red cat"], ["three big dogs"]]
    for name, metric in METRICS.items():
        scores = row_scores(metric, found, wanted)
        assert len(scores) == 2, name
        assert value_of(metric, found, wanted, scores) == score({name: metric}, found, wanted)[0][name]


def test_answers_that_a_metric_can_t_score_are_named() -> None:
    assert misfits(["exact_match", "anls_star", "cer"], ["a text"]) == []
    assert misfits(["field_f1", "box_f1"], ['{"a": 1}']) == [
        "box_f1 can't score the answer: '{\"a\": 1}' names no box, such as [12, 30, 80, 95]"
    ]
    assert misfits(["field_f1", "box_iou"], ["[1, 2, 3, 4]", "[]"]) == []
