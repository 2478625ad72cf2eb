"""Recognises a file's type by its first bytes, for messages about files that are not what their name says."""

from __future__ import annotations

KINDS = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook; unpack it, or save its sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; save its sheet as CSV"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (b"PAR1", "a Parquet file; let its name end in .parquet"),
    (b"SQLite format 3", "an SQLite database; export its table as CSV"),
    (b"%PDF", "a PDF; export its pages as images"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\xff\xfe", "text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16; save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
)
NO_IMAGES = (
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file or an SVG drawing"),
    (b"<!doctype html", "a web page, so its download failed"),
    (b"<html", "a web page, so its download failed"),
    (b"%!ps", "a PostScript file"),
)
CODED = {b"hei": "an HEIC photo", b"hev": "an HEIC photo", b"mif": "an HEIC photo"}
"""By the brand of an ISO media file, in bytes 8 to 10; all other brands are videos."""


def kind_of(head: bytes) -> str | None:
    """The type of a non-text file with this beginning; None if unknown."""
    return next((kind for start, kind in KINDS if head.startswith(start)), None)


def no_image(head: bytes) -> str | None:
    """The type of a file with this beginning that is not a supported image; None if unknown."""
    if head[4:8] == b"ftyp":
        return CODED.get(head[8:11], "a video")
    folded = head.lstrip().lower()
    return next((kind for start, kind in NO_IMAGES if folded.startswith(start)), None) or kind_of(head)
