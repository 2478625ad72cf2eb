"""Procedural scenes: small drawings with questions whose answers are known by construction.

`scene(seed)` is a pure function of the seed, so a data set is a range of integers. The drawings cover colour, shape,
size, place, number, relation, digits and words; the answers are short and never ambiguous. `pico` learns to see here.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from PIL import Image

from vlmtune.data.scene_questions import Question, caption, questions_about
from vlmtune.data.scene_things import alone, arrange, draw

Course = Literal["single", "scenes"]
"""What pico is taught in turn."""
HARD = frozenset({"present", "absent", "count", "relation"})


def scene(seed: int, course: Course = "scenes") -> tuple[Image.Image, list[tuple[str, str]]]:
    """Draw the scene of a seed and return it with its (question, answer) pairs; an empty question is a caption."""
    image, questions = labelled_scene(seed, course=course)
    return image, [(question.text, question.answer) for question in questions]


def labelled_scene(seed: int, questions: int = 10, course: Course = "scenes") -> tuple[Image.Image, list[Question]]:
    """Like `scene`, with the kind of each question.

    `single` scenes hold one object and ask no yes-or-no questions, which a model that sees nothing half answers.
    `questions`: the number besides the caption.
    """
    rng = Random(seed)
    things = {"single": alone, "scenes": arrange}[course](rng)
    image = draw(rng, things, plain=course != "scenes")
    pool = [question for question in questions_about(rng, things) if course == "scenes" or question.kind not in HARD]
    rng.shuffle(pool)
    if course == "single":  # shape is what takes longest to see
        pool.sort(key=lambda question: question.kind != "shape")
        pool = [*pool[:1], *pool[2:], pool[1]]
    return image, [caption(things), *pool[:questions]]
