"""What a drawn scene holds, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random

from PIL import Image, ImageDraw, ImageFont, ImageOps

RGB = tuple[int, int, int]

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
PLACES = tuple(
    " ".join(part for part in (row, column) if part) or "middle"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)


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


# ---------------------------------------------------------------- what is in the scene


def arrange(rng: Random) -> list[Thing]:
    """Half the scenes hold one object, so that seeing starts with the easy case; the others hold text or several."""
    kind = rng.random()
    if kind < 0.5:
        return [one_shape(rng, rng.uniform(0.14, 0.85))]
    if kind < 0.65:
        return [_text(rng)]
    count = rng.choice((2, 2, 3, 3, 4, 5))
    return _spread(rng, count, largest=0.5 if count == 2 else 0.34)


def alone(rng: Random) -> list[Thing]:
    """One shape, neither tiny nor huge."""
    return [one_shape(rng, rng.uniform(0.2, 0.7))]


def one_shape(rng: Random, size: float) -> Thing:
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
        thing = _text(rng) if rng.random() < 0.06 else one_shape(rng, rng.uniform(0.13, largest))
        if all(apart(thing, other) for other in things):
            things.append(thing)
        if len(things) == count:
            break
    return things


def apart(one: Thing, two: Thing) -> bool:
    across = abs(one.x - two.x) > (one.width + two.width) / 2 + 0.03
    down = abs(one.y - two.y) > (one.height + two.height) / 2 + 0.03
    return (across or down) and one.label != two.label


# ---------------------------------------------------------------- drawing


def draw(rng: Random, things: list[Thing], *, plain: bool = False) -> Image.Image:
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
