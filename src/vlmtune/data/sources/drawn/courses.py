"""Three courses of drawn scenes, one after the other: what pico is pre-trained on. Rows are made when asked for."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import cycle, islice
from typing import overload

from PIL import Image

from vlmtune.config.schema import DataConfig
from vlmtune.data.records import Record, Turn
from vlmtune.data.sources.drawn.questions import Question
from vlmtune.data.sources.drawn.scenes import Course, labelled_scene
from vlmtune.data.splits import Records

SCENES, HELD_OUT = 300_000, 200
FIRST_HELD_OUT = 10_000_000
"""Seeds of held-out scenes start here; training never gets that far."""


class Scenes(Records):
    """`scenes` scenes with `rows` rows each: a caption and questions about the same image, one after the other."""

    on_demand = True

    def __init__(self, first: int, scenes: int, rows: int, course: Course):
        self.first, self.scenes, self.rows, self.course = first, scenes, rows, course

    def fingerprint(self) -> str:
        return f"scenes {self.first}+{self.scenes} of {self.rows} rows, {self.course}"

    def image_fingerprint(self) -> None:
        return None

    def groups(self) -> list[int]:
        """The scene of each row."""
        return [row // self.rows for row in range(len(self))]

    def __len__(self) -> int:
        return self.scenes * self.rows

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, self.rows)
        seed = self.first + number
        question = next(islice(cycle(_drawn(seed, self.course)[1]), place, None))
        turn = Turn(question.text or "describe the image.", (question.answer,))
        image = partial(_picture, seed, self.course)
        return Record((turn,), (image,), group=seed, file="drawn scenes", row=index)


@lru_cache(maxsize=512)
def _drawn(seed: int, course: Course) -> tuple[Image.Image, list[Question]]:
    return labelled_scene(seed, questions=20, course=course)


def _picture(seed: int, course: Course) -> Image.Image:
    return _drawn(seed, course)[0]


def load_see(config: DataConfig) -> dict[str, Scenes]:
    """The first course: one object a scene, three rows each."""
    return _course("see", 0, rows=3)


def load_compare(config: DataConfig) -> dict[str, Scenes]:
    """The second course: one object a scene, twenty rows each, most of them yes or no."""
    return _course("compare", 1, rows=20)


def load(config: DataConfig) -> dict[str, Scenes]:
    """The third course: one object, text or several objects a scene; ten rows each."""
    return _course("scenes", 2, rows=10)


def _course(course: Course, number: int, *, rows: int) -> dict[str, Scenes]:
    return {
        "train": Scenes(number * SCENES, SCENES, rows, course),
        "validation": Scenes(FIRST_HELD_OUT, HELD_OUT, 12, course),
    }
