"""Procedural scenes: small drawings with questions whose answers are known by construction.

`scene(seed)` is a pure function of the seed, so a data set is a range of integers. The drawings cover colour, shape,
size, place, number, relation, digits and words; the answers are short and never ambiguous. `pico` learns to see here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random
from typing import Literal

from PIL import Image, ImageDraw, ImageFont, ImageOps

RGB = tuple[int, int, int]
Course = Literal["single", "scenes", "yes_no"]
"""What pico is taught in turn."""

COLOURS: dict[str, tuple[RGB, ...]] = {
    "black": ((0, 0, 0), (20, 20, 24)),
    "blue": ((0, 0, 255), (30, 60, 220)),
    "brown": ((165, 42, 42), (139, 69, 19), (125, 70, 40)),
    "cyan": ((0, 235, 245), (60, 220, 240)),
    "gray": ((128, 128, 128), (145, 145, 145), (112, 112, 112)),
    "green": ((0, 128, 0), (20, 160, 40), (30, 190, 50)),
    "orange": ((255, 140, 0), (250, 120, 10)),
    "pink": ((255, 130, 190), (255, 170, 200)),
    "purple": ((128, 0, 128), (140, 40, 190)),
    "red": ((255, 0, 0), (225, 20, 30)),
    "teal": ((0, 128, 128), (10, 145, 140)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "yellow": ((255, 255, 0), (250, 225, 20)),
}
SHAPES = ("circle", "square", "rectangle", "triangle", "star", "cross", "ring", "diamond")
WORDS = ("cat", "dog", "sun", "car", "yes", "no", "up", "go", "ok", "red", "one", "tea", "map", "key", "bus", "pen")
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

ASK_COLOUR = (
    "which colour is it?",
    "what colour do you see?",
    "name the colour.",
    "tell me its colour.",
    "what is the object's colour?",
)
ASK_COLOUR_OF = (
    "which colour does the {0} have?",
    "what colour is this {0}?",
    "the {0} has which colour?",
    "name the colour of the {0}.",
)
ASK_SHAPE = (
    "which figure is drawn?",
    "name the figure.",
    "what kind of shape do you see?",
    "which shape can you see?",
    "what is drawn here?",
)
ASK_SHAPE_OF = ("which figure is {0}?", "what is the {0} thing?", "name the {0} figure.", "what kind of shape is {0}?")
ASK_PLACE = ("where is the {0}?", "in which part of the image is the {0}?", "at what place is the {0}?")
ASK_COUNT = ("how many {0} are there?", "count the {0}.", "what is the number of {0}?")
ASK_SIZE = ("is the {0} big or small?", "how large is the {0}: big or small?")
ASK_TEXT = ("what does it say?", "read the text.", "what is written here?", "which characters are written?")
ASK_PRESENT = (
    "do you see {0}?",
    "can you find {0} here?",
    "does this picture show {0}?",
    "is {0} visible?",
    "does the drawing have {0}?",
    "{0}: is it in the image?",
)
ASK_ABSENT = (
    "is {0} missing?",
    "does this picture lack {0}?",
    "is it true that you do not see {0}?",
    "does the drawing not have {0}?",
    "is {0} not visible?",
    "is the image without {0}?",
)
ASK_NEIGHBOUR = ("what is {1} the {0}?", "which object is {1} the {0}?")
ASK_AT = ("what is at the {0}?", "look at the {0}: what is there?", "which object is at the {0}?")
ASK_RELATION = ("is the {0} {1} the {2}?", "would you say the {0} is {1} the {2}?")
PLACES = tuple(
    " ".join(part for part in (row, column) if part) or "middle"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
HARD = frozenset({"present", "absent", "count", "relation"})


@dataclass(frozen=True)
class Thing:
    """One drawn object. `x`, `y` is its centre and `width`, `height` its extent, all as fractions of the image side."""

    name: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    is_text: bool = False

    @property
    def label(self) -> str:
        return f'{self.colour} text "{self.name}"' if self.is_text else f"{self.colour} {self.name}"

    @property
    def place(self) -> str:
        """One of nine places, by thirds of the image."""
        row = "top" if self.y < 0.36 else "bottom" if self.y > 0.64 else ""
        column = "left" if self.x < 0.36 else "right" if self.x > 0.64 else ""
        return " ".join(part for part in (row, column) if part) or "middle"


@dataclass(frozen=True)
class Question:
    """`kind` names the skill that the question needs; an empty `text` asks for a caption."""

    kind: str
    text: str
    answer: str


def scene(seed: int, course: Course = "scenes") -> tuple[Image.Image, list[tuple[str, str]]]:
    """Draw the scene of a seed and return it with its (question, answer) pairs; an empty question is a caption."""
    image, questions = labelled_scene(seed, course=course)
    return image, [(question.text, question.answer) for question in questions]


def labelled_scene(seed: int, questions: int = 10, course: Course = "scenes") -> tuple[Image.Image, list[Question]]:
    """Like `scene`, with the kind of each question.

    `single` scenes hold one object and ask no yes-or-no questions, which a model that sees nothing half answers.
    `yes_no` scenes hold one object and ask of nearly nothing else. `questions`: the number besides the caption.
    """
    rng = Random(seed)
    things = _things(rng) if course == "scenes" else [_shape(rng, rng.uniform(0.2, 0.7))]
    image = _draw(rng, things, plain=course != "scenes")
    if course == "yes_no":
        pool = [_presence(rng, things, wanted=index % 2 == 0) for index in range(8)]
        return image, [*_about(rng, things[0], things), *pool]
    pool = [question for question in _questions(rng, things) if course == "scenes" or question.kind not in HARD]
    rng.shuffle(pool)
    if course == "single":  # shape is what takes longest to see
        pool.sort(key=lambda question: question.kind != "shape")
        pool = [*pool[:1], *pool[2:], pool[1]]
    return image, [_caption(things), *pool[:questions]]


# ---------------------------------------------------------------- what is in the scene


def _things(rng: Random) -> list[Thing]:
    """Half the scenes hold one object, so that seeing starts with the easy case; the others hold text or several."""
    kind = rng.random()
    if kind < 0.5:
        return [_shape(rng, rng.uniform(0.14, 0.85))]
    if kind < 0.65:
        return [_text(rng)]
    count = rng.choice((2, 2, 3, 3, 4, 5))
    return _spread(rng, count, largest=0.5 if count == 2 else 0.34)


def _shape(rng: Random, size: float) -> Thing:
    name = rng.choice(SHAPES)
    short = size * rng.uniform(0.4, 0.72) if name == "rectangle" else size
    if name in ("triangle", "diamond"):
        short = size * rng.uniform(0.7, 1.0)
    width, height = (size, short) if rng.random() < 0.5 else (short, size)
    return _placed(rng, name, width, height)


def _text(rng: Random) -> Thing:
    word = str(rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10, 100))
    if rng.random() < 0.4:
        word = rng.choice(WORDS)
    height = rng.uniform(0.2, 0.5)
    return _placed(rng, word, min(0.9, height * 0.65 * len(word)), height, is_text=True)


def _placed(rng: Random, name: str, width: float, height: float, is_text: bool = False) -> Thing:
    def centre(extent: float) -> float:
        room = 1 - extent - 0.04  # the square root favours the rim: large objects would nearly all be in the middle
        return 0.5 + room * rng.choice((-0.5, 0.5)) * sqrt(rng.random())

    return Thing(name, rng.choice(tuple(COLOURS)), centre(width), centre(height), width, height, is_text)


def _spread(rng: Random, count: int, largest: float) -> list[Thing]:
    """Up to `count` objects that do not touch and of which no two share colour and name."""
    things: list[Thing] = []
    for _ in range(count * 6):
        thing = _text(rng) if rng.random() < 0.06 else _shape(rng, rng.uniform(0.13, largest))
        if all(_apart(thing, other) for other in things):
            things.append(thing)
        if len(things) == count:
            break
    return things


def _apart(one: Thing, two: Thing) -> bool:
    across = abs(one.x - two.x) > (one.width + two.width) / 2 + 0.03
    down = abs(one.y - two.y) > (one.height + two.height) / 2 + 0.03
    return (across or down) and one.label != two.label


# ---------------------------------------------------------------- drawing


def _draw(rng: Random, things: list[Thing], *, plain: bool = False) -> Image.Image:
    side = rng.choice((64, 64, 64, 80, 96, 112))
    scale = rng.choice((1, 3))
    inks = {thing: _ink(rng, thing.colour) for thing in things}
    image = _background(rng, side * scale, list(inks.values()), plain)
    pen = ImageDraw.Draw(image)
    for thing, ink in inks.items():
        (_draw_text if thing.is_text else _draw_shape)(rng, pen, thing, ink, side * scale)
    return image if scale == 1 else image.resize((side, side), Image.Resampling.BOX)


def _ink(rng: Random, colour: str) -> RGB:
    return _jitter(rng, rng.choice(COLOURS[colour]), 10)


def _jitter(rng: Random, colour: RGB, amount: int) -> RGB:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def _background(rng: Random, side: int, inks: list[RGB], plain: bool) -> Image.Image:
    """A flat colour or a gradient that every ink stands out from; `plain`: nearly always a pale flat one."""
    first, second = (_contrasting(rng, inks) for _ in range(2))
    pale = _jitter(rng, (238, 238, 238), 16)
    if plain and _gap(pale, inks) > 130:
        first = pale
    if plain or rng.random() < 0.7:
        return Image.new("RGB", (side, side), first)
    ramp = Image.linear_gradient("L").resize((side, side))
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    return ImageOps.colorize(ramp, first, _jitter(rng, first, 25) if _luma(first) * 2 > 255 else second)


def _contrasting(rng: Random, inks: list[RGB]) -> RGB:
    tries = [_paper(rng) for _ in range(3)]
    last = max([*tries, (20, 20, 30), (150, 160, 210)], key=lambda colour: _gap(colour, inks))
    return next((colour for colour in tries if _gap(colour, inks) > 130), last)


def _gap(colour: RGB, inks: list[RGB]) -> int:
    """How far a colour is from the nearest ink: absolute differences summed over the channels."""
    return min(sum(abs(a - b) for a, b in zip(colour, ink, strict=True)) for ink in inks)


def _paper(rng: Random) -> RGB:
    kind = rng.random()
    if kind < 0.6:
        return rng.randint(190, 255), rng.randint(190, 255), rng.randint(190, 255)
    if kind < 0.8:
        return 255, 255, 255
    return rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60)


def _luma(colour: RGB) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _draw_text(rng: Random, pen: ImageDraw.ImageDraw, thing: Thing, ink: RGB, side: int) -> None:
    size = int(min(thing.height * 1.15, thing.width / len(thing.name) * 1.7) * side)
    pen.text((thing.x * side, thing.y * side), thing.name, fill=ink, font=_font(size), anchor="mm")


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_shape(rng: Random, pen: ImageDraw.ImageDraw, thing: Thing, ink: RGB, side: int) -> None:
    box = [
        (thing.x - thing.width / 2) * side,
        (thing.y - thing.height / 2) * side,
        (thing.x + thing.width / 2) * side,
        (thing.y + thing.height / 2) * side,
    ]
    if thing.name == "circle":
        pen.ellipse(box, fill=ink)
    elif thing.name == "ring":
        pen.ellipse(box, outline=ink, width=max(2, int(thing.width * side * rng.uniform(0.14, 0.2))))
    else:
        outline = _outline(rng, thing.name)
        points = [(box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1])) for x, y in outline]
        pen.polygon(points, fill=ink)


STAR = tuple(
    (0.5 + 0.52 * x, 0.53 + 0.52 * y)
    for x, y in (
        (0, -1),
        (0.24, -0.32),
        (0.95, -0.31),
        (0.38, 0.12),
        (0.59, 0.81),
        (0, 0.4),
        (-0.59, 0.81),
        (-0.38, 0.12),
        (-0.95, -0.31),
        (-0.24, -0.32),
    )
)


def _outline(rng: Random, name: str) -> list[tuple[float, float]]:
    """Corners in the unit square."""
    if name == "star":
        return list(STAR)
    if name == "diamond":
        return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    if name == "cross":
        a = rng.uniform(0.32, 0.38)
        b = 1 - a
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if name == "triangle":
        corners = [(rng.choice((0.5, 0.5, rng.random())), 0.0), (1.0, 1.0), (0.0, 1.0)]
        turn = rng.choice((0, 0, 1, 2, 3))
        return [((x, y), (y, x), (x, 1 - y), (1 - y, x))[turn] for x, y in corners]
    return [(0, 0), (1, 0), (1, 1), (0, 1)]


# ---------------------------------------------------------------- questions


def _caption(things: list[Thing]) -> Question:
    parts = [f"{_a(thing.label)} at the {thing.place}" for thing in sorted(things, key=lambda thing: thing.x)]
    return Question("caption", "", ", ".join(parts) + ".")


def _questions(rng: Random, things: list[Thing]) -> Iterator[Question]:
    shapes = [thing for thing in things if not thing.is_text]
    if len(things) == 1:
        yield Question("colour", rng.choice(ASK_COLOUR), things[0].colour)
        if shapes:
            yield Question("shape", rng.choice(ASK_SHAPE), shapes[0].name)
    for thing in rng.sample(things, min(3, len(things))):
        yield from _about(rng, thing, things)
    yield from _at(rng, things)
    for index in range(4):
        yield _presence(rng, things, wanted=index % 2 == 0)
    yield from _counts(rng, shapes)
    if len(things) > 1:
        for _ in range(3):
            one, two = rng.sample(things, 2)
            yield from _relations(rng, one, two, things)


def _about(rng: Random, thing: Thing, things: list[Thing]) -> Iterator[Question]:
    """Colour, shape, place, size or text of one thing, where a short description singles it out."""
    noun = "text" if thing.is_text else thing.name
    if sum(_noun(other) == noun for other in things) == 1:
        yield Question("colour", rng.choice(ASK_COLOUR_OF).format(noun), thing.colour)
    if sum(other.colour == thing.colour for other in things) == 1 and not thing.is_text:
        yield Question("shape", rng.choice(ASK_SHAPE_OF).format(thing.colour), thing.name)
    if thing.is_text:
        yield Question("text", rng.choice(ASK_TEXT), thing.name)
    name = noun if len(things) == 1 else f"{thing.colour} {noun}"
    yield Question("place", rng.choice(ASK_PLACE).format(name), thing.place)
    extent = max(thing.width, thing.height)
    if not thing.is_text and not 0.28 < extent < 0.42:
        yield Question("size", rng.choice(ASK_SIZE).format(name), "big" if extent > 0.35 else "small")


def _at(rng: Random, things: list[Thing]) -> Iterator[Question]:
    """What is at a place: one that holds a single object, and one that may be empty."""
    for place in (rng.choice(things).place, rng.choice(PLACES)):
        here = [_a(thing.label) for thing in things if thing.place == place]
        if len(here) < 2:
            yield Question("at", rng.choice(ASK_AT).format(place), here[0] if here else "nothing")


def _presence(rng: Random, things: list[Thing], wanted: bool) -> Question:
    """Is a thing there, or is it missing? `wanted`: whether the thing asked for is in the scene."""
    kind = rng.choice(("colour", "shape", "both", "both"))
    shapes = [thing for thing in things if not thing.is_text]
    if not shapes:
        kind = "colour"
    present = {_description(thing, kind) for thing in (shapes if kind != "colour" else things)}
    phrase = rng.choice(sorted(present)) if wanted else _absent(rng, things, kind, present)
    negated = rng.random() < 0.4
    text = rng.choice(ASK_ABSENT if negated else ASK_PRESENT).format(phrase)
    return Question("absent" if negated else "present", text, "yes" if wanted != negated else "no")


def _description(thing: Thing, kind: str) -> str:
    return {"colour": f"something {thing.colour}", "shape": _a(thing.name), "both": _a(thing.label)}[kind]


def _absent(rng: Random, things: list[Thing], kind: str, present: set[str]) -> str:
    """A description that fits nothing here; half of the time it is one change away from something that is here."""
    while True:
        thing = rng.choice(things)
        colour = thing.colour if kind == "both" and rng.random() < 0.4 else rng.choice(tuple(COLOURS))
        name = thing.name if not thing.is_text and rng.random() < 0.4 else rng.choice(SHAPES)
        phrase = _description(Thing(name, colour, 0, 0, 0, 0), kind)
        if phrase not in present:
            return phrase


def _counts(rng: Random, shapes: list[Thing]) -> Iterator[Question]:
    yield Question("count", rng.choice(ASK_COUNT).format("shapes"), COUNT_WORDS[len(shapes)])
    if shapes and (len(shapes) > 1 or rng.random() < 0.3):
        name = rng.choice(shapes).name if rng.random() < 0.8 else rng.choice(SHAPES)
        yield Question(
            "count",
            rng.choice(ASK_COUNT).format(_plural(name)),
            COUNT_WORDS[sum(thing.name == name for thing in shapes)],
        )


def _relations(rng: Random, one: Thing, two: Thing, things: list[Thing]) -> Iterator[Question]:
    across, down = two.x - one.x, two.y - one.y
    if abs(abs(across) - abs(down)) < 0.1:
        return
    side = ("left of" if across > 0 else "right of") if abs(across) > abs(down) else "above" if down > 0 else "below"
    first, second = (f"{thing.colour} {_noun(thing)}" for thing in (one, two))
    if len(things) == 2:
        yield Question("relation", rng.choice(ASK_NEIGHBOUR).format(second, side), _a(first))
    true = rng.random() < 0.5
    asked = side if true else OPPOSITE[side]
    yield Question("relation", rng.choice(ASK_RELATION).format(first, asked, second), "yes" if true else "no")


def _noun(thing: Thing) -> str:
    return "text" if thing.is_text else thing.name


def _plural(name: str) -> str:
    return f"{name}es" if name == "cross" else f"{name}s"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
