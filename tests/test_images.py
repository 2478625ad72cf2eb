"""Images in every state a user's folder has them in."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from vlmtune.data.images import NeededSize, image_size, open_image
from vlmtune.errors import DataError

MOST = 10_000
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(source: Any, most: int = MOST) -> str:
    with pytest.raises(DataError) as caught:
        open_image(source, most)
    return str(caught.value)


def near(pixel: Any, colour: tuple[int, int, int], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("as_source", ["path", "text", "bytes", "image", "function"])
def test_every_kind_of_source_gives_the_same_rgb_pixels(as_source: str, tmp_path: Path) -> None:
    drawn = Image.new("RGB", (3, 2), RED)
    drawn.save(tmp_path / "a.png")
    source: Any = {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "bytes": encoded(drawn),
        "image": drawn,
        "function": lambda: drawn,
    }[as_source]
    opened = open_image(source, MOST)
    assert (opened.mode, opened.size, image_size(source, MOST)) == ("RGB", (3, 2), (3, 2))
    assert opened.tobytes() == drawn.tobytes()


def test_an_image_of_the_users_stays_as_it_was(tmp_path: Path) -> None:
    """Drawing on what open_image gave must not draw on the caller's image, and a look at its size must not close it."""
    Image.new("RGB", (2, 2), RED).save(tmp_path / "a.png")
    mine = Image.open(tmp_path / "a.png")
    assert image_size(mine, MOST) == (2, 2)
    open_image(mine, MOST).putpixel((0, 0), WHITE)
    assert mine.getpixel((0, 0)) == RED


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_upright_and_its_header_size_agrees(format: str, orientation: int) -> None:
    """Of a photo with an EXIF orientation, both pixels and size are those of the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.new("RGB", (24, 8), RED), format, exif=exif)
    expected = (24, 8) if orientation < 5 else (8, 24)
    assert open_image(content, MOST).size == image_size(content, MOST) == expected


def test_orientation_turns_the_right_way() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the stored left edge is the scene's top
    stored = Image.new("RGB", (2, 1), WHITE)
    stored.putpixel((0, 0), RED)
    upright = open_image(encoded(stored, exif=exif), MOST)
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == RED


def test_cmyk_jpeg_is_not_inverted() -> None:
    assert near(open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), MOST).getpixel((4, 4)), RED)


def transparent(mode: str) -> bytes:
    """Encode a visible pixel beside a fully transparent one whose hidden colour is black."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255) if mode in ("RGBA", "P", "RGB") else (60, 60, 60, 255))
    if mode in ("RGBA", "LA"):
        return encoded(image.convert(mode))
    image = image.convert("RGB").convert(mode)
    hidden = image.getpixel((1, 0))
    return encoded(image, transparency=hidden)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_transparency_becomes_white_paper(mode: str) -> None:
    """Under a dropped alpha channel, PNG logos turn into whatever colour hides there, mostly black on black."""
    content = transparent(mode)
    assert Image.open(io.BytesIO(content)).has_transparency_data
    assert open_image(content, MOST).getpixel((1, 0)) == WHITE


def test_transparent_palette_of_an_image_in_memory_becomes_white() -> None:
    image = Image.new("PA", (1, 1))
    image.putpixel((0, 0), (0, 0))
    assert open_image(image, MOST).getpixel((0, 0)) == WHITE


def test_half_transparent_red_on_white_is_pink() -> None:
    assert near(
        open_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), MOST).getpixel((0, 0)), (255, 127, 127)
    )


def test_one_bit_image_is_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image), MOST)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


@pytest.mark.parametrize(
    ("mode", "format", "value", "grey"),
    [
        ("I;16", "PNG", 65535, 255),
        ("I;16", "PNG", 32768, 128),
        ("I;16", "PNG", 257, 1),  # plain convert() clips: everything above 255 would be white
        ("I", "TIFF", 32768, 128),
        ("F", "TIFF", 1.0, 255),
        ("F", "TIFF", 0.5, 128),
    ],
)
def test_deep_grey_is_scaled_by_its_types_range(mode: str, format: str, value: float, grey: int) -> None:
    """By the type's range and not by the image's own, so that equal values look equal in two images."""
    content = encoded(Image.new(mode, (2, 2), value), format)
    assert Image.open(io.BytesIO(content)).mode == mode
    assert open_image(content, MOST).getpixel((0, 0)) == (grey, grey, grey)


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("I", -1), ("F", 200.0)])
def test_values_without_an_agreed_white_are_refused(mode: str, value: float) -> None:
    assert "unknown value range" in refusal(encoded(Image.new(mode, (2, 2), value), "TIFF"))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content, MOST).getpixel((0, 0)) == RED


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_refused_and_never_half_grey(format: str, share: float) -> None:
    content = encoded(Image.effect_noise((80, 80), 90).convert("RGB"), format)
    assert "image" in refusal(content[: int(len(content) * share)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_a_header_check_does_not_decode(format: str) -> None:
    """PIL's getexif() decodes a PNG: a million headers would take hours."""
    content = encoded(Image.effect_noise((80, 80), 90), format)
    assert image_size(content[: len(content) // 2], MOST) == (80, 80)


@pytest.mark.parametrize("look", [open_image, image_size])
def test_too_many_pixels_are_refused_before_decoding(look: Any) -> None:
    """The file is cut off in its pixels: any decoding would complain of that instead."""
    content = encoded(Image.effect_noise((101, 100), 90), "JPEG")
    with pytest.raises(DataError, match=r"101 x 100.*data\.max_image_pixels=10000"):
        look(content[: len(content) // 2], 10_000)
    assert image_size(content, 10_100) == (101, 100)


def test_the_users_bound_wins_over_pils(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL stops at twice its own bound, so a user who raises data.max_image_pixels would still be refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_image(encoded(Image.new("L", (10, 10))), 100).size == (10, 10)


def test_a_header_beyond_pils_own_bound_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert refusal(encoded(Image.new("L", (100, 100))), 10).startswith("too many pixels")


def test_a_program_is_not_run_for_a_picture(tmp_path: Path) -> None:
    """PIL hands EPS to Ghostscript: an image column must not start programs."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    assert "not an image" in refusal(tmp_path / "a.eps")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "0 bytes"), (b"<html>404</html>", "not an image"), (b"\x89PNG\r\n\x1a\n", "image")],
)
def test_what_is_no_image_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert expected in refusal(tmp_path / "a.png")
    assert "a.png" in refusal(tmp_path / "a.png")
    assert expected in refusal(content)


@pytest.mark.parametrize("there", ["cat_01.jpeg", "Cat_01.JPG", "cta_01.jpg", "cat_1.jpg"])
def test_a_missing_image_names_the_nearest_file(there: str, tmp_path: Path) -> None:
    for name in (there, *(f"dog_{i}.jpg" for i in range(100))):
        (tmp_path / name).touch()
    assert f"did you mean {there}?" in refusal(tmp_path / "cat_01.jpg")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path} has no images" in refusal(tmp_path / "images" / "train" / "a.png")


def test_a_folder_and_a_pipe_are_no_images(tmp_path: Path) -> None:
    """Reading a pipe would hang the audit for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_a_sentence_in_the_image_column_is_refused_briefly() -> None:
    """Swapped columns: a path longer than the file system allows raises OSError from is_dir, not FileNotFoundError."""
    message = refusal("what is this? " * 500)
    assert len(message) < 400


def test_a_function_that_fails_or_gives_no_image() -> None:
    def broken() -> Image.Image:
        raise KeyError("cell 7")

    assert "cell 7" in refusal(broken)
    assert "must return a PIL image" in refusal(lambda: "a.png")


# ---------------------------------------------------------------- large JPEGs


def smooth(width: int, height: int) -> Image.Image:
    """A picture with nothing finer than eight pixels."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("needed", "size"),
    [
        (NeededSize(pixels=200 * 150), (400, 300)),  # a quarter has 4 times the pixels, an eighth just as many
        (NeededSize(side=400), (800, 600)),
        (NeededSize(side=450), (1600, 1200)),
        (NeededSize(pixels=1600 * 1200), (1600, 1200)),
        (NeededSize(), (200, 150)),
        (None, (1600, 1200)),
    ],
)
def test_a_large_jpeg_is_decoded_as_small_as_its_use_allows(needed: NeededSize | None, size: tuple[int, int]) -> None:
    file = io.BytesIO()
    smooth(1600, 1200).save(file, "JPEG", quality=95)
    found = open_image(file.getvalue(), 10**8, needed)
    assert found.size == size
    target = (100, 75)
    whole = open_image(file.getvalue(), 10**8).resize(target, Image.Resampling.BICUBIC)
    small = found.resize(target, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(whole, float) - np.asarray(small, float)).mean() < 2


def test_a_turned_jpeg_is_reduced_and_upright_and_other_formats_stay_whole() -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    file, other = io.BytesIO(), io.BytesIO()
    smooth(800, 400).save(file, "JPEG", exif=turned)
    smooth(800, 400).save(other, "PNG")
    assert open_image(file.getvalue(), 10**8, NeededSize(side=100)).size == (200, 400)
    assert open_image(other.getvalue(), 10**8, NeededSize(side=100)).size == (800, 400)
