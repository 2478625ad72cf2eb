"""Questions about a drawn scene, with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from vlmtune.data.sources.drawn.things import COLOURS, PLACES, SHAPES, Thing

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
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


@dataclass(frozen=True)
class Question:
    """`kind` names the skill that the question needs; an empty `text` asks for a caption."""

    kind: str
    text: str
    answer: str


def caption(things: list[Thing]) -> Question:
    parts = [f"{_a(thing.label)} at the {thing.place}" for thing in sorted(things, key=lambda thing: thing.x)]
    return Question("caption", "", ", ".join(parts) + ".")


def looks(rng: Random, thing: Thing) -> Iterator[Question]:
    """What only a model that sees can answer of one shape: its shape, then colour, place or again shape."""
    yield Question("shape", rng.choice(ASK_SHAPE), thing.name)
    rest = [
        Question("colour", rng.choice(ASK_COLOUR), thing.colour),
        Question("place", rng.choice(ASK_PLACE).format(thing.name), thing.place),
        Question("shape", rng.choice(ASK_SHAPE_OF).format(thing.colour), thing.name),
    ]
    rng.shuffle(rest)
    yield from rest


def comparisons(rng: Random, thing: Thing, count: int) -> Iterator[Question]:
    """Colour, shape and place of one shape, then yes or no: is it so, or is it not? Half of the things asked for are
    there."""
    yield Question("colour", rng.choice(ASK_COLOUR), thing.colour)
    yield Question("shape", rng.choice(ASK_SHAPE), thing.name)
    yield Question("place", rng.choice(ASK_PLACE).format(thing.name), thing.place)
    for index in range(count - 3):
        kind = ("colour", "shape", "both")[index % 3]
        yield _presence(rng, [thing], wanted=index // 3 % 2 == 0, kind=kind)


def questions_about(rng: Random, things: list[Thing]) -> Iterator[Question]:
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


def _presence(rng: Random, things: list[Thing], wanted: bool, kind: str | None = None) -> Question:
    """Is a thing there, or is it missing? `wanted`: whether the thing asked for is in the scene."""
    kind = kind or rng.choice(("colour", "shape", "both", "both"))
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
