"""The images of the page, in memory: as many of the newest as fit."""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import dataclass

from vlmtune.data.images import open_image
from vlmtune.errors import DataError

MOST_BYTES = 32 * 2**20
"""Of one image file."""
HELD_BYTES = 256 * 2**20
"""Of all image files together; the oldest are forgotten."""
PREVIEW_SIDE = 1024


@dataclass(frozen=True)
class Upload:
    """An image file that was found to be usable."""

    key: str
    content: bytes
    preview: bytes
    """What the page shows: JPEG, upright, of at most PREVIEW_SIDE pixels a side."""
    width: int
    height: int


class Uploads:
    """Image files by the hash of their content. May be used by several threads."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        self._held: dict[str, Upload] = {}
        self._lock = threading.Lock()  # also lets one image at a time fill memory with its pixels

    def add(self, content: bytes) -> Upload:
        """Check an image file and keep it. Raises DataError if it is no image, damaged, or has too many pixels."""
        key = hashlib.sha256(content).hexdigest()[:32]
        with self._lock:
            upload = self._held.pop(key, None) or self._opened(key, content)
            self._held[key] = upload
            while sum(len(each.content) for each in self._held.values()) > HELD_BYTES:
                del self._held[next(iter(self._held))]
        return upload

    def of(self, key: str) -> Upload:
        """Raises DataError if there is no such image, or not any more."""
        with self._lock:
            if key not in self._held:
                raise DataError("this image is no longer held; add it again")
            return self._held[key]

    def _opened(self, key: str, content: bytes) -> Upload:
        try:
            image = open_image(content, self.max_pixels)
        except DataError as error:
            raise DataError(str(error).replace("bytes in memory: ", "").replace("bytes in memory", "it")) from error
        size = image.size
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        preview = io.BytesIO()
        image.save(preview, "JPEG", quality=90)
        return Upload(key, content, preview.getvalue(), *size)
