"""Any image of a user -> upright 8-bit RGB pixels, or a DataError that says what would work.

The rules, one per pitfall:

- Only the raster formats in `FORMATS` are opened; PIL's other formats may start programs (EPS) or load stub handlers.
- Transparent pixels are put on white, as browsers and document viewers show them.
- Values of more than 8 bits are scaled by the type's range, 0..65535 to 0..255, never by an image's own extremes: equal
  pixel values stay equal across images. Floats are read as 0..1. Values outside these ranges are refused.
- Of an animation, the first frame is used.
- A truncated file is refused; it never becomes a half-grey image.
- Broken metadata (texts, colour profiles, EXIF) does not make an image unusable.

The part of a message before its first colon is the category of the fault; the audit counts by it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from vlmtune.data.bare_png import bare_png
from vlmtune.data.file_kinds import no_image
from vlmtune.data.paths import existing
from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")
Source = Path | bytes | Image.Image | Callable[[], Image.Image]
"""An image source: a file, a file's content, an image in memory, or a function that returns one."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
READABLE = f"supported formats: {', '.join(FORMATS)}"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by EXIF orientation."""
T = TypeVar("T")


@dataclass
class NeededSize:
    """The minimum size of an image that a processor will scale down further."""

    pixels: int = 0
    side: int = 0
    """Minimum of the shorter side, in pixels."""
    logged: bool = field(default=False, compare=False)
    """Whether the log already says that images are reduced."""

    def reduction(self, width: int, height: int) -> int:
        """The largest of 8, 4, 2 by which both sides can be divided and stay 1.4 times as large as needed; else 1."""
        fits = (
            scale
            for scale in (8, 4, 2)
            if width * height >= 1.96 * self.pixels * scale**2 and min(width, height) >= 1.4 * self.side * scale
        )
        return next(fits, 1)

    def log(self, name: str, width: int, height: int, scale: int) -> None:
        """Log the first image that is decoded at a reduced size: the model sees slightly different pixels."""
        if not self.logged:
            log.info(
                "data.fast_jpeg: JPEG files much larger than the model sees are decoded at a reduced size, first %s, "
                "%d x %d at 1/%d; pixels differ slightly from those of the full image scaled down, in training and "
                "prediction alike; data.fast_jpeg=false disables it",
                *(name, width, height, scale),
            )
        self.logged = True


def open_image(source: Source | str, max_pixels: int, needed: NeededSize | None = None) -> Image.Image:
    """Decode `source` to a new upright RGB image, which the caller may modify.

    `needed`: the minimum size; a much larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is much faster.

    Raises DataError if it is missing, not an image, damaged, or has more than `max_pixels` pixels (width x height,
    checked before anything is decoded).
    """

    def decoded(image: Image.Image) -> Image.Image:
        if needed is not None and image.format == "JPEG" and (scale := needed.reduction(*image.size)) > 1:
            needed.log(_name(source), *image.size, scale)
            image.draft(None, (-(-image.width // scale), -(-image.height // scale)))
        return _rgb(_upright(image))

    return _look(source, max_pixels, decoded)


def image_size(source: Source | str, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` would return, only from the header.

    Raises DataError as `open_image` does, except for damage after the header, which only decoding finds.
    """

    def upright_size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if image.format == "TIFF":  # PIL has already swapped the sides
            return width, height
        # PNG's getexif decodes the image, to find EXIF data after the pixels
        return (height, width) if _orientation(image, Image.Image.getexif) in (5, 6, 7, 8) else (width, height)

    return _look(source, max_pixels, upright_size)


def content_key(source: Path | bytes) -> str:
    """A hash of an image file's bytes. Raises OSError if it can't be read."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return _file_key(source, source.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1_000_000)
def _file_key(path: Path, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _look(source: Source | str, max_pixels: int, look: Callable[[Image.Image], T]) -> T:
    """The result of `look` for an image with a readable header and an allowed size. Faults become DataErrors."""
    name = _name(source)
    # PIL's own limit would warn or stop below ours; raising it, never lowering it, is thread-safe
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        return _within(source, name, max_pixels, look)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(name, "far more", max_pixels)) from None
    except Exception as error:  # on damaged input PIL's decoders raise nearly every type of exception
        with suppress(Exception):
            if (bare := bare_png(_content(source))) is not None:
                return _within(bare, name, max_pixels, look)
        raise DataError(_fault(source, name, error)) from error


def _within(source: Source | str, name: str, max_pixels: int, look: Callable[[Image.Image], T]) -> T:
    image = _header(source)
    with image if isinstance(source, str | Path | bytes) else nullcontext(image):  # only close what was opened here
        if image.width * image.height > max_pixels:
            raise DataError(_too_large(name, f"{image.width} x {image.height}", max_pixels))
        return look(image)


def _fault(source: Source | str, name: str, error: Exception) -> str:
    """Why PIL can't open or decode an image."""
    if isinstance(error, UnidentifiedImageError):
        kind = no_image(_content(source)[:64])
        if kind in ("a PNG image", "a JPEG image"):
            return f"damaged image: {name}: is {kind} whose header can't be read; export or copy it again"
        return f"not an image: {name}: {f'is {kind}; ' if kind else ''}save it as PNG or JPEG; {READABLE}"
    if isinstance(error, OSError) and error.strerror:
        return f"unreadable image: {name}: {error.strerror}"
    return f"damaged image: {name}: {error!s:.200}; export or copy it again"


def _content(source: Source | str) -> bytes:
    if isinstance(source, bytes):
        return source
    return Path(source).read_bytes() if isinstance(source, str | Path) else b""


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"too many pixels: {name} has {size}, above data.max_image_pixels={max_pixels}; scale it down or raise that"


def _name(source: Source | str) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"
    return f"{type(source).__name__} in memory"


def _header(source: Source | str) -> Image.Image:
    """Open a source far enough that its size and mode are known."""
    if isinstance(source, str | Path):
        return Image.open(existing(Path(source)), formats=FORMATS)
    if isinstance(source, bytes):
        if not source:
            raise DataError("empty image: it has 0 bytes; fetch it again")
        return Image.open(io.BytesIO(source), formats=FORMATS)
    image = source if isinstance(source, Image.Image) else source()
    if not isinstance(image, Image.Image):
        raise DataError(f"not an image: the function returned {type(image).__name__}; it must return a PIL image")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """A copy of an image, rotated according to its EXIF data."""
    image.load()
    turn = TURNS.get(_orientation(image, type(image).getexif))
    return image.copy() if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, getexif: Callable[[Any], Image.Exif]) -> int:
    """The orientation in an image's EXIF data, 1 to 8; 1 (upright) if it can't be read, as in image viewers."""
    try:
        return int(getexif(image).get(ExifTags.Base.Orientation, 1))
    except (
        Exception
    ):  # PIL's parsers raise nearly every type of exception on broken metadata, although the pixels are fine
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale integers from 0..65535, or floats from 0..1, to 8-bit grey, rounding to nearest."""
    values, top = image.convert("F"), 1 if image.mode == "F" else 65535
    low, high = values.getextrema()
    if not 0 <= low <= high <= top:  # type: ignore[operator]
        raise DataError(f"unknown value range: pixels of {low} to {high}, where 0 to {top} is white; save it as 8-bit")
    return values.point(lambda value: value * (255 / top) + 0.5).convert("L")
