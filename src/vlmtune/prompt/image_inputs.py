"""The images of some rows -> the model's image tensors, and the text for each image in a prompt."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from PIL import Image

from vlmtune.data.images import NeededSize, image_size, open_image
from vlmtune.data.records import Record
from vlmtune.errors import DataError
from vlmtune.memo import Memo
from vlmtune.prompt.families import Family, Process, Processed, Shown


class ImageCache(Protocol):
    """Keeps what is computed for images: the processor's tensors, or features."""

    def of(self, shown: Shown, images: Process) -> Processed:
        """Inputs and expansions of the images `shown`."""


class ImageInputs(NamedTuple):
    """The images of some rows, each distinct image once."""

    tensors: dict[str, Any]
    """The family's tensors for all images, from one call."""
    expansions: list[str]
    """The text for each image."""
    images_of: list[list[int]]
    """For each row the indices of its images."""


class ImageProcessing:
    """Opens images and passes them to the family's processor.

    `needed`: the minimum size of a large JPEG that is decoded at a reduced size; None: never reduced.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: Any,
        max_pixels: int,
        needed: NeededSize | None,
    ):
        self.family, self.max_pixels, self.needed = family, max_pixels, needed
        self.cache: ImageCache | None = None
        self.tokenizer = tokenizer
        self.tokens = Memo(self._tokens, most=100_000)
        """Number of tokens in a prompt for images of given sizes that are shown together."""

    def keeping(self, cache: ImageCache | None) -> ImageProcessing:
        """A copy with a cache for the model inputs of images; None: they are computed each time."""
        other = copy.copy(self)
        other.cache = cache
        return other

    def open(self, source: Any) -> Image.Image:
        """An image as the processor gets it. Raises DataError as `open_image` does."""
        return open_image(source, self.max_pixels, self.needed)

    def size(self, source: Any) -> tuple[int, int]:
        """Width and height of what `open` would return, only from the image's header."""
        return image_size(source, self.max_pixels)

    def _tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        if not sizes:
            return 0
        _, expansions = self.family.images([[Image.new("RGB", size) for size in sizes]])
        ids = self.tokenizer(expansions, add_special_tokens=False)["input_ids"]
        return sum(map(len, ids))

    def of(self, records: Sequence[Record], groups: Sequence[Hashable]) -> ImageInputs:
        """The images of `records`. Neighbouring rows of one group share them; rows with group None share with no row.

        Raises DataError, with the row's place, for an image that can't be opened or that the processor refuses.
        """
        sources, images_of = _distinct_images(records, groups)
        if not sources:
            return ImageInputs({}, [], images_of)
        row_of = {index: record for record, own in zip(records, images_of, strict=True) for index in own}
        shown = list({tuple(own): None for own in images_of if own})

        @functools.cache
        def opened(index: int) -> Image.Image:
            try:
                return self.open(sources[index])
            except DataError as error:
                raise DataError(f"{row_of[index].place}: {error}") from error

        try:
            if self.cache is not None:
                cached = [([sources[i] for i in own], [partial(opened, i) for i in own]) for own in shown]
                return ImageInputs(*self.cache.of(cached, self.family.images), images_of)
            return ImageInputs(*self.family.images([[opened(i) for i in own] for own in shown]), images_of)
        except ValueError as error:  # a shape that the family doesn't support, such as a very thin image
            pictures = map(opened, range(len(sources)))
            sizes = [f"{row_of[i].place} ({p.width}x{p.height})" for i, p in enumerate(pictures)]
            which = sizes[0] if len(sizes) == 1 else f"one of {', '.join(sizes[:8])}"
            raise DataError(f"{which}: the model's processor refuses the image: {error}") from error


def _distinct_images(records: Sequence[Record], groups: Sequence[Hashable]) -> tuple[list[Any], list[list[int]]]:
    """All image sources of the rows in order, once for neighbouring rows of a group; and the indices per row."""
    sources: list[Any] = []
    images_of: list[list[int]] = []
    before = None
    for record, group in zip(records, groups, strict=True):
        if group is not None and group == before:
            images_of.append(images_of[-1])
        else:
            images_of.append(list(range(len(sources), len(sources) + len(record.images))))
            sources += record.images
        before = group
    return sources, images_of
