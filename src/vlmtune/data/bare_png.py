"""A PNG without what stands beside its pixels.

Image generators write megabytes of text into a PNG, and editors leave colour profiles and other chunks half written;
decoders refuse the whole file for them. Its pixels are sound all the same.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
"""Chunks that say how the picture looks: size, palette, pixels, transparency, and which side is up."""


def bare_png(content: bytes) -> bytes | None:
    """`content` with the chunks in `PIXELS` alone, or None where it is no PNG or has none but these.

    An `eXIf` whose checksum is wrong is left out; the checksums of the others stay as they are, for the decoder to see.
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
