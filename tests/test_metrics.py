from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.errors import ConfigError
from vlmtune.metrics import (
    METRICS,
    anls,
    exact_match,
    lower_is_better,
    resolve,
    rouge_l,
    score,
    token_f1,
    vqa_accuracy,
    vqa_accuracy_lenient,
)
from vlmtune.metrics import texts as metrics

TEXTS = {name: metric for name, metric in METRICS.items() if not name.startswith(("cider_d", "field_", "box_"))}


@pytest.mark.parametrize("name", TEXTS)
def test_every_metric_tells_the_answer_from_another(name: str) -> None:
    """A single reference is the usual case; VQA's published formula alone scores 0 on it."""
    metric, lower = METRICS[name], lower_is_better(name)
    right, wrong = (0, 1) if lower else (1, 0)
    assert metric("blue circle", ["blue circle"]) == right
    assert metric("", ["blue circle"]) == wrong
    assert metric("xyz", ["blue circle"]) == (wrong if name != "wer" else 1)
    half = 0.5 if metric in (vqa_accuracy, vqa_accuracy_lenient) else right
    assert metric("xyz", ["blue circle", "xyz"]) == half


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        (" Yes. ", ["yes"], 1),
        ("dark\n blue", ["Dark blue!"], 1),
        ("no", ["yes", "NO"], 1),
        ("no yes", ["yes", "no"], 0),
        ("cafe\u0301", ["café"], 1),
        ("?", ["!"], 0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


def published(matches: int, people: int) -> float:
    """VQA v2's formula as its authors state it: leave each person out in turn, min(matches / 3, 1) against the rest."""
    agrees = [True] * matches + [False] * (people - matches)
    return sum(min((matches - left_out) / 3, 1) for left_out in agrees) / people


@pytest.mark.parametrize("people", [4, 10])
def test_vqa_accuracy_is_the_published_formula_where_enough_people_were_asked(people: int) -> None:
    for matches in range(people + 1):
        references = ["cat"] * matches + ["dog"] * (people - matches)
        assert vqa_accuracy("a cat", references) == pytest.approx(published(matches, people))


@pytest.mark.parametrize(
    ("matches", "people", "expected"), [(1, 1, 1), (0, 1, 0), (1, 2, 0.5), (2, 3, 2 / 3), (3, 3, 1)]
)
def test_vqa_accuracy_of_few_references_reaches_1(matches: int, people: int, expected: float) -> None:
    assert vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (people - matches)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("two", "2"),
        ("The cat", "cat"),
        ("1,000", "1000"),
        ("dont", "don't"),
        ("ping-pong", "ping pong"),
        ("2.5.", "2.5"),
    ],
)
def test_vqa_accuracy_applies_the_published_normalisation(prediction: str, reference: str) -> None:
    assert vqa_accuracy(prediction, [reference]) == 1
    assert vqa_accuracy(f"{prediction} x", [reference]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("ab", ["ac"], 0.5),  # the leaderboard's script keeps a distance of exactly one half
        ("INV-001", ["inv-001"], 1),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


def test_captions() -> None:
    reference = "a dog runs on the beach"
    assert token_f1("dog on beach", [reference]) == pytest.approx(2 * 3 / (3 + 4))
    assert token_f1("the beach runs on a dog", [reference]) == 1
    assert rouge_l("the beach runs on a dog", [reference]) == pytest.approx(2 * 2 / 12)
    assert rouge_l("a dog on the beach", [reference]) == pytest.approx(2 * 5 / 11)


def test_resolve_lists_every_wrong_name_with_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def length(prediction, references):\n    return min(len(prediction), 1)\n"
    )
    (tmp_path / "broken_metrics.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve(["anls", "own_metrics.length"])["own_metrics.length"]("abc", ["x"]) == 1
    with pytest.raises(ConfigError) as caught:
        resolve(["exact_mach", "own_metrics.lenght", "nowhere.f", "broken_metrics.f", "anls"])
    mistyped, own, nowhere, broken = caught.value.problems
    assert "did you mean exact_match?" in mistyped
    assert "did you mean length?" in own
    assert "nowhere" in nowhere
    assert "division by zero" in broken


def test_score_gives_means_and_rows() -> None:
    means, rows = score(resolve(["exact_match", "anls"]), ["cat", "cab"], [["cat"], ["cat"]])
    assert means == {"exact_match": 0.5, "anls": pytest.approx(5 / 6)}
    assert rows[1] == {"exact_match": 0.0, "anls": pytest.approx(2 / 3)}


def test_importing_metrics_is_light() -> None:
    """The config is checked before anything heavy is imported."""
    code = "import sys, vlmtune.metrics; assert not {'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules)"
    source = str(Path(metrics.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source})
