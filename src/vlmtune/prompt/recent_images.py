"""The processor's tensors of the images that are being worked on, so that several passes prepare each image once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.prompt.cache_folder import Entry
from vlmtune.prompt.families import Process, Processed, Shown
from vlmtune.prompt.image_cache import joined

KEPT_BYTES = 2**28
"""Size limit of the entries that no waiting row needs: neighbouring rows often show the same images."""


class Kept(NamedTuple):
    sources: Sequence[Any]
    """Kept so that the identity of an opened image, which may be its key, is not given to another one."""
    entry: Entry


class RecentImages:
    """Entries of the last rows, in memory; `Encoder.keeping` takes it in place of a run's cache.

    Each image is processed as if alone, as in `image_cache`.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, Kept] = {}
        """The most recently used last."""

    def of(self, shown: Shown, images: Process) -> Processed:
        """Inputs and expansions of the images `shown`."""
        for sources, opened in shown:
            entry = self.get(sources) or Entry(*images([[each() for each in opened]]))
            self.put(sources, entry)
        return joined([self.kept[key_of(sources)].entry for sources, _ in shown])

    def get(self, sources: Sequence[Any]) -> Entry | None:
        """The entry of images that a prompt shows together."""
        kept = self.kept.get(key_of(sources))
        return None if kept is None else kept.entry

    def put(self, sources: Sequence[Any], entry: Entry) -> None:
        key = key_of(sources)
        self.kept.pop(key, None)
        self.kept[key] = Kept(sources, entry)

    def let_go(self, *, waiting: Iterable[Sequence[Any]] = ()) -> None:
        """Drop the oldest entries above KEPT_BYTES, but none of the images `waiting`."""
        needed = {key_of(sources) for sources in waiting}
        free = [key for key in self.kept if key not in needed]
        size = sum(self.kept[key].entry.size for key in free)
        for key in free:
            if size <= KEPT_BYTES:
                return
            size -= self.kept.pop(key).entry.size


def key_of(sources: Sequence[Any]) -> Hashable:
    """Equal for the same images: files by path, others by identity."""
    return tuple(source if isinstance(source, Path | bytes) else id(source) for source in sources)
