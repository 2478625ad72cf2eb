"""Records -> tokens, labels and image tensors.

The chat template writes each row (`prompt.py`); the text of each image is put in place of its placeholder. Answers are
found again in the token sequence by character offsets, which hold for every tokenizer.
"""

from __future__ import annotations

import copy
import functools
import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmtune import display
from vlmtune.data.images import image_size, open_image
from vlmtune.data.records import Record
from vlmtune.errors import DataError, ModelError
from vlmtune.prompt.families import family_of
from vlmtune.prompt.feature_tokens import Shortened, repeat, shortened
from vlmtune.prompt.image_budget import enough
from vlmtune.prompt.rendering import ONE, Prompt

if TYPE_CHECKING:
    from vlmtune.config.schema import Config
    from vlmtune.prompt.image_cache import Pixels

IGNORE = -100


@dataclass
class Encoded:
    """Rows ready to be put into a batch. Lists have one entry per row unless said otherwise."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """Token ids where supervised, IGNORE elsewhere."""
    token_types: list[list[int]] | None
    """What families that need it are told of each token: image or text, prompt or answer."""
    token_types_name: str
    """The model's name for it."""
    images_of: list[list[int]]
    """Indices into the image tensors."""
    image_inputs: dict[str, Any] = field(default_factory=dict)
    """What the processor returned about the images, one call for all of them."""


class Encoder:
    """Encodes records for one model's processor.

    `supervise`: the turns that are trained on, the `last` or `all`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        system_prompt: str | None = None,
        max_image_pixels: int = 100_000_000,
        supervise: str = "last",
        fast_jpeg: bool = True,
    ):
        self.processor = processor
        self.max_image_pixels = max_image_pixels
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                f"{type(processor).__name__} has no chat template, so prompts can't be written as it expects"
            )
        self.family = family_of(processor)
        self.enough = enough(processor) if fast_jpeg else None
        self.image_cache: Pixels | None = None
        """Where images become model inputs once, if it is set."""
        self.pad_to_multiple_of = 1
        """Batches are as long as a multiple of this."""
        self.prompt = Prompt(processor, self.family, system_prompt, supervise)
        self.tokenizer = self.prompt.tokenizer

    @classmethod
    def of(cls, processor: Any, config: Config, *, multiple: int = 1) -> Encoder:
        """The encoder of a run. Batches are as long as a multiple of `multiple`."""
        encoder = cls(
            processor,
            system_prompt=config.model.system_prompt,
            max_image_pixels=config.data.max_image_pixels,
            supervise=config.data.supervise,
            fast_jpeg=config.data.fast_jpeg,
        )
        encoder.pad_to_multiple_of = multiple
        return encoder

    def keeping(self, cache: Pixels | None) -> Encoder:
        """An encoder like this one that keeps what images become in `cache`."""
        other = copy.copy(self)
        other.image_cache = cache
        return other

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the template's own, and the tokenizer's."""
        ending = self.prompt.ending(ONE).marker or self.prompt.own_end()
        tail = self.tokenizer(ending, add_special_tokens=False)["input_ids"]
        return sorted({tail[-1], self.tokenizer.eos_token_id} - {None})

    @functools.cached_property
    def image_ids(self) -> list[int]:
        """Ids that stand for images: no answer holds one."""
        token = self.tokenizer.convert_tokens_to_ids(self.family.image_token)
        ids = {token, *getattr(self.processor, "image_token_ids", [])} - {None, self.tokenizer.unk_token_id}
        return sorted(i for i in ids if isinstance(i, int))

    # ---------------------------------------------------------------- text

    def check(self, record: Record) -> None:
        """Raise DataError where this family can't take such a row, whatever its texts and images hold."""
        if self.family.needs_image and not record.images:
            raise DataError(f"{record.place}: has no image, and {type(self.processor).__name__} takes no text alone")
        self.prompt.check(record)

    def render(
        self, record: Record, *, answered: bool, expansions: Sequence[str] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a row, and the characters of its supervised parts: separator, answer, end token of each.

        `expansions`: the text that stands for each of the row's images; None leaves placeholders.
        """
        text, spans = self.prompt.of(record, answered=answered)
        if expansions is None:
            return text, spans
        head, *rest = text.split(self.family.image_token) if self.family.image_token else [text]
        if len(rest) != len(expansions):
            raise DataError(
                f"{record.place}: this model's chat template has {len(rest)} places for {len(expansions)} images"
            )
        starts, out = [], head
        for expansion, part in zip(expansions, rest, strict=True):
            starts.append(len(out))
            out += expansion + part
        growth = [len(expansion) - len(self.family.image_token or "") for expansion in expansions]
        moved = [(_moved(begin, starts, growth), _moved(end, starts, growth)) for begin, end in spans]
        return out, moved

    def supervised_texts(self, record: Record) -> list[str]:
        """What a row trains on, with what the template puts around."""
        text, spans = self.render(record, answered=True)
        return [self.prompt.as_written(text[begin:end]) for begin, end in spans]

    def added(self, ids: Sequence[int]) -> list[int]:
        """Those of `ids` that are added tokens, single bytes aside."""
        return [i for i in ids if i in self._added_ids]

    def added_in(self, record: Record) -> list[int]:
        """Added tokens that the supervised texts of a row name, in order."""
        text, spans = self.render(record, answered=True)
        names = [name for begin, end in spans for name in self._added_name.findall(text[begin:end])]
        return [self.tokenizer.convert_tokens_to_ids(name) for name in names]

    def composed(self, text: str) -> str:
        """The form of a text that tokenizers compare in: they may compose accents, drop outer space, and write a space
        after an added token (Llama's).
        """
        return self._around_added.sub(r"\1", unicodedata.normalize("NFC", text)).strip()

    @functools.cached_property
    def _around_added(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._added_name.pattern})\s*")

    @functools.cached_property
    def _added_ids(self) -> set[int]:
        """What is looked for in a text before anything else: it is this token wherever it stands."""
        added = self.tokenizer.added_tokens_decoder.items()
        plain = (i for i, t in added if not (t.single_word or t.lstrip or t.rstrip or (t.normalized and not t.special)))
        return {i for i in plain if not re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(i))}

    @functools.cached_property
    def _added_name(self) -> re.Pattern[str]:
        names = map(self.tokenizer.convert_ids_to_tokens, self._added_ids)
        return re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)")

    def by_the_processor(self, record: Record, *, answered: bool) -> Any:
        """What the family's processor makes of a row by itself, called as its documentation does."""
        text, _ = self.render(record, answered=answered)
        pictures = [open_image(source, self.max_image_pixels, self.enough) for source in record.images]
        bos, own = self.tokenizer.bos_token, self.processor.tokenizer
        self.processor.tokenizer = self.tokenizer  # reads a user's markers as text
        try:
            return self.processor(
                text=[text],
                images=[pictures] if pictures else None,
                add_special_tokens=not (bos and bos in text),
                return_tensors="pt",
            )
        finally:
            self.processor.tokenizer = own

    # ---------------------------------------------------------------- tokens

    def encode(self, records: Sequence[Record], *, answered: bool, images_once: bool = False) -> Encoded:
        """Tokens of `records`, with labels if `answered`; else they end where the answer begins.

        `images_once`: neighbouring rows of one `prompt.group` share their image tensors, which then appear once.
        """
        for record in records:
            self.check(record)
        groups = [self.prompt.group(record) if images_once else None for record in records]
        sources, images_of = _distinct_images(records, groups)
        image_inputs, expansions = self._process_images(records, sources, images_of)
        short = [self._shortened(expansion) for expansion in expansions]
        texts, spans = [], []
        for record, own in zip(records, images_of, strict=True):
            text, supervised = self.render(record, answered=answered, expansions=[short[i].text for i in own])
            texts.append(text)
            spans.append(supervised)
        ids, labels = self._tokens(texts, spans)
        for row, its_labels, own in zip(ids, labels, images_of, strict=True):
            self._repeat(row, its_labels, [count for i in own for count in short[i].counts])
        name, types = self.family.token_types(ids, labels) or ("", None)
        return Encoded(ids, labels, types, name, images_of, image_inputs)

    def _tokens(self, texts: list[str], spans: list[list[tuple[int, int]]]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of `texts`, and labels in the characters of `spans`.

        Where a token would hold characters of both sides of a span's beginning (the prompt's last newline and an
        answer's first), the sides are tokenized apart: generation starts from the prompt's own tokens.
        """
        bos = self.tokenizer.bos_token
        special = not (bos and bos in texts[0])
        found = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special)
        ids, labels = found["input_ids"], []
        for n, (text, own, offsets) in enumerate(zip(texts, spans, found["offset_mapping"], strict=True)):
            if any(begin < start < end for start, _ in own for begin, end in offsets):
                ids[n], row = self._apart(text, own, special)
            else:
                row = [i if _within(place, own) else IGNORE for i, place in zip(ids[n], offsets, strict=True)]
            labels.append(row)
        return ids, labels

    def _shortened(self, expansion: str) -> Shortened:
        if self._feature_id is None:
            return Shortened(expansion, [])
        return shortened(expansion, self.family.feature_token)

    @functools.cached_property
    def _feature_id(self) -> int | None:
        return self.tokenizer.get_added_vocab().get(self.family.feature_token)

    def _repeat(self, ids: list[int], labels: list[int], counts: list[int]) -> None:
        """Have each feature token of one row stand as often as `counts` say, in order."""
        places = [n for n, i in enumerate(ids) if i == self._feature_id] if counts else []
        if len(places) != len(counts):
            raise ModelError(
                f"{len(places)} places for image features in a prompt that shows {len(counts)} runs of them"
            )
        repeat(ids, places, counts)
        repeat(labels, places, counts)

    def _apart(self, text: str, spans: list[tuple[int, int]], special: bool) -> tuple[list[int], list[int]]:
        """Tokens and labels of one text, tokenized in pieces that begin and end where spans do."""
        ids: list[int] = []
        labels: list[int] = []
        cuts = sorted({0, len(text), *(at for span in spans for at in span)})
        for begin, end in pairwise(cuts):
            own = self.tokenizer(text[begin:end], add_special_tokens=special and begin == 0)["input_ids"]
            ids += own
            labels += own if any(start <= begin < stop for start, stop in spans) else [IGNORE] * len(own)
        return ids, labels

    # ---------------------------------------------------------------- images

    def _process_images(
        self, records: Sequence[Record], sources: list[Any], images_of: list[list[int]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Image tensors of all distinct images, and the text that stands for each of them in a prompt."""
        if not sources:
            return {}, []
        owner = {index: record for record, own in zip(records, images_of, strict=True) for index in own}
        shown = list({tuple(own): None for own in images_of if own})

        @functools.cache
        def opened(index: int) -> Any:
            try:
                return open_image(sources[index], self.max_image_pixels, self.enough)
            except DataError as error:
                raise DataError(f"{owner[index].place}: {error}") from error

        try:
            if self.image_cache is not None:
                groups = [([sources[i] for i in own], [partial(opened, i) for i in own]) for own in shown]
                return self.image_cache.of(groups, self.family.images)
            return self.family.images([[opened(i) for i in own] for own in shown])
        except ValueError as error:  # a shape that the family can't take, such as a strip
            pictures = map(opened, range(len(sources)))
            sizes = [f"{owner[i].place} ({p.width}x{p.height})" for i, p in enumerate(pictures)]
            which = sizes[0] if len(sizes) == 1 else f"one of {', '.join(sizes[:8])}"
            raise DataError(f"{which}: the model's processor refuses the image: {error}") from error

    def lengths(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Tokens of each row's images and of its text, with its answer; images are read as far as their size."""
        found, chunk, token = [], 1024, self.family.feature_token
        with display.bar("measuring rows", len(records), show=len(records) > 20 * chunk) as advance:
            for start in range(0, len(records), chunk):
                rows = [records[i] for i in range(start, min(start + chunk, len(records)))]
                sizes = [tuple(image_size(source, self.max_image_pixels) for source in row.images) for row in rows]
                blank = [self.render(row, answered=True, expansions=[token] * len(row.images))[0] for row in rows]
                special = not ((bos := self.tokenizer.bos_token) and bos in blank[0])
                texts = self.tokenizer(blank, add_special_tokens=special)["input_ids"]
                found += [(self.image_tokens(s), len(ids) - len(s)) for s, ids in zip(sizes, texts, strict=True)]
                advance(len(rows))
        return found

    @functools.cached_property
    def image_tokens(self) -> Any:
        """Tokens that images of given sizes, shown together, take in a prompt."""
        family, tokenizer = self.family, self.tokenizer  # not `self`: a cycle would keep this, and a model, alive

        @functools.lru_cache(maxsize=100_000)
        def count(sizes: tuple[tuple[int, int], ...]) -> int:
            if not sizes:
                return 0
            _, expansions = family.images([[Image.new("RGB", size) for size in sizes]])
            ids = tokenizer(expansions, add_special_tokens=False)["input_ids"]
            return sum(map(len, ids))

        return count

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids -> answers: without control tokens, and without the template's separator around them."""
        kept = [[i for i in row if i not in self._special or not self._is_control(i)] for row in ids]
        texts = self.processor.tokenizer.batch_decode(kept, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {i: t.content for i, t in self.processor.tokenizer.added_tokens_decoder.items() if t.special}

    def _is_control(self, number: int) -> bool:
        return self.prompt.is_control(self._special[number])


def _distinct_images(records: Sequence[Record], groups: Sequence[Hashable]) -> tuple[list[Any], list[list[int]]]:
    """All image sources of the rows in order, those of neighbours in a group only once; indices per row."""
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


def _moved(place: int, starts: list[int], growth: list[int]) -> int:
    """Where a character stands once placeholders have grown; `starts`: of the expansions, in the new text."""
    for start, more in zip(starts, growth, strict=True):
        if start < place:
            place += more
    return place


def _within(place: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    """Whether a token's characters overlap one of `spans`."""
    begin, end = place
    return end > begin and any(begin < stop and end > start for start, stop in spans)
