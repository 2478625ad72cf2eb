"""The drawn scenes, and the model that was pre-trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.config.schema import DataConfig, GenerationConfig, MethodConfig, ModelConfig
from vlmtune.data.records import Record, Turn
from vlmtune.data.sources.drawn import courses
from vlmtune.data.sources.drawn.scenes import Course, labelled_scene
from vlmtune.models import pico

WEIGHTS = Path(pico.__file__).parent / "pico_weights"


@pytest.mark.parametrize("course", ["see", "compare", "scenes"])
def test_a_scene_is_a_function_of_its_seed(course: Course) -> None:
    (one, asked), (again, asked_again) = labelled_scene(7, course=course), labelled_scene(7, course=course)
    assert one.tobytes() == again.tobytes()
    assert asked == asked_again
    assert labelled_scene(8, course=course)[0].tobytes() != one.tobytes()


def test_scenes_ask_nothing_that_easy_vqa_asks() -> None:
    """Or pico's scores on easy-VQA would be no test of seeing."""
    import easy_vqa

    theirs = set(easy_vqa.get_train_questions()[0]) | set(easy_vqa.get_test_questions()[0])
    courses: tuple[Course, ...] = ("see", "compare", "scenes")
    ours = {q.text for course in courses for seed in range(300) for q in labelled_scene(seed, 20, course)[1]}
    assert len(ours) > 500
    assert not ours & theirs


@pytest.mark.parametrize("load", [courses.load, courses.load_see, courses.load_compare])
def test_rows_of_a_scene_share_its_image_and_held_out_ones_are_never_trained_on(load: object) -> None:
    splits = load(DataConfig())  # type: ignore[operator]
    train, held_out = splits["train"], splits["validation"]
    rows = train[: train.rows]
    assert {row.group for row in rows} == {rows[0].group}
    assert train[train.rows].group != rows[0].group
    assert train.groups()[: train.rows + 1] == [0] * train.rows + [1]
    assert train[len(train) - 1].group < held_out[0].group
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.slow
def test_the_weights_that_ship_are_small_safe_and_see() -> None:
    import torch
    from accelerate import Accelerator

    from vlmtune.evaluation.generate import generate
    from vlmtune.models.load import load
    from vlmtune.prompt.encode import Encoder

    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 16_000_000
    assert not [file for file in WEIGHTS.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    fp32, cpu = torch.float32, torch.device("cpu")
    model, processor = load(ModelConfig(path=str(WEIGHTS)), MethodConfig(), dtype=fp32, compute_dtype=fp32, device=cpu)
    right: dict[str, list[bool]] = {}
    rows, asked = [], []
    for seed in range(courses.FIRST_HELD_OUT, courses.FIRST_HELD_OUT + 30):
        picture, questions = labelled_scene(seed, 9, "compare")
        rows += [Record((Turn(question.text),), (picture,)) for question in questions[1:]]
        asked += questions[1:]
    limits = GenerationConfig(max_new_tokens=8)
    found = generate(model, Encoder(processor), rows, limits, batch_size=90, autocast=Accelerator(cpu=True).autocast)
    for question, answer in zip(asked, found, strict=True):
        right.setdefault(question.kind, []).append(answer == question.answer)
    shares = {kind: sum(verdicts) / len(verdicts) for kind, verdicts in right.items()}
    least = {"colour": 0.95, "shape": 0.8, "place": 0.8, "present": 0.95, "absent": 0.95}
    assert all(shares[kind] >= share for kind, share in least.items()), shares
