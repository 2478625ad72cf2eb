"""Procedural scenes: small drawings with questions whose answers are known by construction.

`scene(seed)` is a pure function of the seed, so a data set is a range of integers. The drawings cover colour, shape,
size, place, number, relation, digits and words; the answers are short and never ambiguous. `pico` learns to see here.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from PIL import Image

from vlmtune.data.sources.drawn.questions import Question, caption, comparisons, looks, questions_about
from vlmtune.data.sources.drawn.things import alone, arrange, draw

Course = Literal["see", "compare", "scenes"]
"""What pico is taught in turn: to see one object, to compare it with words, and scenes of several."""


def scene(seed: int, course: Course = "scenes") -> tuple[Image.Image, list[tuple[str, str]]]:
    """Draw the scene of a seed and return it with its (question, answer) pairs; an empty question is a caption."""
    image, questions = labelled_scene(seed, course=course)
    return image, [(question.text, question.answer) for question in questions]


def labelled_scene(seed: int, questions: int = 10, course: Course = "scenes") -> tuple[Image.Image, list[Question]]:
    """Like `scene`, with the kind of each question.

    `see` asks nothing that a model which sees nothing half answers, and often for the shape, which takes longest;
    `compare` asks little else than yes or no. `questions`: the number besides the caption.
    """
    rng = Random(seed)
    things = arrange(rng) if course == "scenes" else alone(rng)
    image = draw(rng, things, plain=course != "scenes")
    if course == "see":
        asked = list(looks(rng, things[0]))
    elif course == "compare":
        asked = list(comparisons(rng, things[0], questions))
    else:
        asked = list(questions_about(rng, things))
        rng.shuffle(asked)
    return image, [caption(things), *asked[:questions]]
