"""From any image a user has to upright 8-bit RGB pixels, or to a DataError that says what would work.

The rules, one per trap:

- Only raster formats in `FORMATS` are opened; PIL's others may start programs (EPS) or fetch stub handlers.
- Transparent pixels are put on white, as browsers and document viewers show them.
- More than 8 bits are scaled by the range of the type, 0..65535 to 0..255, never by an image's own extremes: equal
  pixel values stay equal across images. Floats are read as 0..1. Values beyond these ranges are refused.
- The first frame of an animation counts.
- A file that ends early is refused; it never becomes a half-grey picture.

The part of a message up to its first colon names the kind of fault; the audit counts by it.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")
Source = Path | bytes | Image.Image | Callable[[], Image.Image]
"""Where an image comes from: a file, a file's content, an image in memory, or a function that returns one."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@dataclass
class Enough:
    """How large an image must stay for a processor that will scale it down further."""

    pixels: int = 0
    side: int = 0
    """Of the shorter side."""
    told: bool = field(default=False, compare=False)
    """Whether the log says that images are reduced."""

    def reduction(self, width: int, height: int) -> int:
        """The largest of 8, 4, 2 by which both sides may be divided and still be 1.4 times what is needed; else 1."""
        fits = (
            scale
            for scale in (8, 4, 2)
            if width * height >= 1.96 * self.pixels * scale**2 and min(width, height) >= 1.4 * self.side * scale
        )
        return next(fits, 1)

    def tell(self, name: str, width: int, height: int, scale: int) -> None:
        """Log the first image that is decoded at a reduced size: the model sees slightly other pixels."""
        if not self.told:
            log.info(
                "data.fast_jpeg: JPEG files much larger than the model sees are decoded at a reduced size, first %s, "
                "%d x %d at 1/%d; pixels differ a little from those of the whole image scaled down, in training and "
                "prediction alike (data.fast_jpeg=false: never)",
                *(name, width, height, scale),
            )
        self.told = True


def open_image(source: Source | str, max_pixels: int, enough: Enough | None = None) -> Image.Image:
    """Decode `source` to an upright RGB image of its own, which the caller may change.

    `enough`: what its user needs of it; a much larger JPEG is then decoded at a half, a quarter or an eighth of its
    size, which takes a fraction of the time.

    Raises DataError when it is missing, not an image, damaged, or has more than `max_pixels` pixels (width x height,
    checked before anything is decoded).
    """
    with _opened(source, max_pixels) as image:
        if enough is not None and image.format == "JPEG" and (scale := enough.reduction(*image.size)) > 1:
            enough.tell(_name(source), *image.size, scale)
            image.draft(None, (-(-image.width // scale), -(-image.height // scale)))
        return _rgb(ImageOps.exif_transpose(image))


def image_size(source: Source | str, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` would return, from the header alone.

    Raises DataError as `open_image` does, except for damage behind the header, which only decoding finds.
    """
    with _opened(source, max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # PIL has swapped its sides already
            return width, height
        exif = Image.Image.getexif(image)  # a PNG's own getexif decodes it, to find EXIF written behind the pixels
        return (height, width) if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else (width, height)


def content_key(source: Path | bytes) -> str:
    """Equal for equal bytes of an image's file. Raises OSError where it can't be read."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return _file_key(source, source.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1_000_000)
def _file_key(path: Path, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _opened(source: Source | str, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read and whose size is allowed; all that goes wrong inside becomes a DataError."""
    name = _name(source)
    # PIL's own bound would warn below ours or stop below it; raising it, never lowering it, is safe from any thread.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = _header(source)
        with image if isinstance(source, str | Path | bytes) else nullcontext(image):  # close what we opened only
            if image.width * image.height > max_pixels:
                raise DataError(_too_large(name, f"{image.width} x {image.height}", max_pixels))
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image: {name}: save it as PNG or JPEG; readable are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(name, "far more", max_pixels)) from None
    except Exception as error:  # on damaged input PIL's decoders raise nearly every type there is
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"unreadable image: {name}: {error.strerror}") from error
        raise DataError(f"damaged image: {name}: {error!s:.200}; export or copy it again") from error


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"too many pixels: {name} has {size}, above data.max_image_pixels={max_pixels}; scale it down or raise that"


def _name(source: Source | str) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"
    return f"{type(source).__name__} in memory"


def _header(source: Source | str) -> Image.Image:
    """Open a source so far that its size and mode are known."""
    if isinstance(source, str | Path):
        return Image.open(_existing(Path(source)), formats=FORMATS)
    if isinstance(source, bytes):
        if not source:
            raise DataError("empty image: it has 0 bytes; fetch it again")
        return Image.open(io.BytesIO(source), formats=FORMATS)
    image = source if isinstance(source, Image.Image) else source()
    if not isinstance(image, Image.Image):
        raise DataError(f"not an image: the function gave {type(image).__name__}; it must return a PIL image")
    return image


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"not an image: {path}: is a folder; name a file in it")
    if not path.exists():
        raise DataError(f"no such image: {path}; {whats_there(path)}")
    if not path.is_file():
        raise DataError(f"not an image: {path}: is no regular file")
    if not path.stat().st_size:
        raise DataError(f"empty image: {path} has 0 bytes; fetch it again")
    return path


def whats_there(path: Path) -> str:
    """What to write instead of a file that does not exist: a near name in its folder, or the folder that is missing."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        return f"{folder} has no {path.absolute().relative_to(folder).parts[0]}"
    names, stems = _listing(folder, folder.stat().st_mtime_ns)
    if same_stem := stems.get(path.stem.casefold()):
        return f"did you mean {same_stem}?"
    position = bisect.bisect(names, path.name)
    neighbours = names[max(0, position - 4) : position + 4]  # in alphabetical order: a folder may hold a million
    close = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"did you mean {close[0]}?" if close else f"{folder} holds {len(names)} other names"


@functools.lru_cache(maxsize=8)
def _listing(folder: Path, modified: int) -> tuple[list[str], dict[str, str]]:
    """Names in a folder, sorted, and by their stem in lower case. `modified` makes a changed folder a new entry."""
    names = sorted(entry.name for entry in folder.iterdir())
    return names, {Path(name).stem.casefold(): name for name in names}


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
    """Scale integers from 0..65535, or floats from 0..1, to 8-bit grey, rounded to the nearest."""
    values, top = image.convert("F"), 1 if image.mode == "F" else 65535
    low, high = values.getextrema()
    if not 0 <= low <= high <= top:  # type: ignore[operator]
        raise DataError(f"unknown value range: pixels of {low} to {high}, where 0 to {top} is white; save it as 8-bit")
    return values.point(lambda value: value * (255 / top) + 0.5).convert("L")
