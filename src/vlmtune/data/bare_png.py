"""A PNG reduced to its pixels, without metadata.

Image generators write megabytes of text into a PNG, and editors leave colour profiles and other chunks incomplete.
Decoders then refuse the whole file although its pixels are fine.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
"""Chunks that define how the image looks: size, palette, pixels, transparency and orientation."""


def bare_png(content: bytes) -> bytes | None:
    """`content` with only the chunks in `PIXELS`, or None if it is not a PNG or has no other chunks.

    An `eXIf` chunk with a wrong checksum is dropped; the other checksums are kept, for the decoder to verify.
    """
    if not content.startswith(SIGNATURE):
        return None
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        chunk = content[at : at + 12 + length]
        if kind in PIXELS and not (kind == b"eXIf" and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:])):
            kept.append(chunk)
        at += 12 + length
    bare = b"".join(kept)
    return bare if len(bare) < len(content) else None
