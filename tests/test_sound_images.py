"""Sound pictures in odd files: what stands beside the pixels makes none of them a damaged one."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from vlmtune.data.bare_png import SIGNATURE
from vlmtune.data.images import image_size, open_image
from vlmtune.errors import DataError

MOST = 10_000
PICTURE = Image.effect_noise((60, 40), 90).convert("RGB")


def encoded(format: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(SIGNATURE)
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length


def png(kind: bytes, data: bytes, *, behind: bool = False, broken: bool = False, count: int = 1) -> bytes:
    """The picture with `count` chunks more, before or behind its pixels; `broken`: with a wrong checksum."""
    parts = list(chunks(encoded("PNG")))
    place = -1 if behind else 1
    parts[place:place] = [(kind, data)] * count
    out = [SIGNATURE]
    for name, body in parts:
        check = zlib.crc32(name + body) ^ (broken and name == kind)
        out.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", check))
    return b"".join(out)


def jpeg(marker: int, data: bytes) -> bytes:
    """The picture as a JPEG with one segment more."""
    plain = encoded("JPEG", quality=95)
    return plain[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + plain[2:]


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes().removeprefix(b"Exif\0\0")


MUCH = zlib.compress(b"x" * 2_000_000)
SOUND = {
    "2 MB of text": png(b"zTXt", b"k\0\0" + MUCH),
    "2 MB of international text": png(b"iTXt", b"k\0\1\0\0\0" + MUCH),
    "2 MB of text behind the pixels": png(b"zTXt", b"k\0\0" + MUCH, behind=True),
    "70 texts of 1 MB": png(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000), count=70),
    "a text that unpacks to 200 MB": png(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 200_000_000)),
    "2 MB of colour profile": png(b"iCCP", b"k\0\0" + MUCH),
    "an empty colour profile": png(b"iCCP", b""),
    "a text with a wrong checksum": png(b"tEXt", b"k\0v", broken=True),
    "a text packed in an unknown way": png(b"zTXt", b"k\0\7abc"),
    "an empty gamma": png(b"gAMA", b""),
    "half a resolution": png(b"pHYs", b"\0"),
    "half an animation header": png(b"acTL", b"\0\0"),
    "EXIF data that are none": png(b"eXIf", b"garbage"),
    "EXIF data with a wrong checksum": png(b"eXIf", b"garbage", broken=True),
    "an unknown chunk": png(b"vpAg", b"??"),
    "bytes behind the end of a PNG": encoded("PNG") + b"behind",
    "EXIF data in a JPEG that are none": jpeg(0xE1, b"Exif\0\0garbage!"),
    "part of a colour profile": jpeg(0xE2, b"ICC_PROFILE\0\5\x09abc"),
    "a long comment": jpeg(0xFE, b"x" * 60_000),
    "bytes behind the end of a JPEG": encoded("JPEG") + bytes(100),
    "progressive": encoded("JPEG", progressive=True),
    "CMYK": encoded("JPEG", PICTURE.convert("CMYK")),
    "two pictures in a JPEG": encoded("MPO", save_all=True, append_images=[PICTURE]),
    "EXIF data in a WebP that are none": encoded("WEBP", exif=b"Exif\0\0garbage!"),
    "an animated PNG": encoded("PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "a GIF cut in its second frame": encoded("GIF", save_all=True, append_images=[PICTURE.rotate(180)])[:-400],
    "a TIFF of two pages": encoded("TIFF", save_all=True, append_images=[PICTURE]),
    "a TIFF in Lab": encoded("TIFF", PICTURE.convert("LAB")),
    "a fax": encoded("TIFF", PICTURE.convert("1"), compression="group4"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_picture_is_opened(name: str) -> None:
    assert image_size(SOUND[name], MOST) == (60, 40)
    opened = open_image(SOUND[name], MOST)
    assert (opened.size, opened.mode) == ((60, 40), "RGB")
    if SOUND[name].startswith(SIGNATURE):
        assert opened.tobytes() == PICTURE.tobytes()


def test_a_picture_stays_upright_when_its_texts_are_left_out() -> None:
    """The orientation stands beside the pixels too; without it a photo would be trained on sideways."""
    content = png(b"zTXt", b"k\0\0" + MUCH)
    parts = list(chunks(content))
    parts.insert(1, (b"eXIf", sideways()))
    whole = SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    assert image_size(whole, MOST) == (40, 60)
    assert open_image(whole, MOST).tobytes() == PICTURE.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("broken", ["pixels", "size"])
def test_damage_in_the_pixels_is_still_damage(broken: str) -> None:
    content = png(b"tEXt", b"k\0v", broken=True)
    at = content.index(b"IDAT") + 20 if broken == "pixels" else content.index(b"IHDR") + 4
    damaged = content[:at] + bytes(byte ^ 0x55 for byte in content[at : at + 30]) + content[at + 30 :]
    with pytest.raises(DataError, match="damaged image"):
        open_image(damaged, MOST)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "is an HEIC photo"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "is a video"),
        (b"%PDF-1.7", "is a PDF; export its pages"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\3\4" + bytes(40), "is a zip archive"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "damaged image: bytes in memory: is a JPEG image whose header"),
    ],
)
def test_what_is_no_picture_is_named(content: bytes, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_image(content, MOST)
    assert expected in str(caught.value)
