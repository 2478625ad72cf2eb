"""Records -> tokens, labels and image tensors.

The chat template is rendered once per shape of conversation with stand-ins for the texts; a row's own texts are then
put in between the template's pieces, and the text of each image in place of its placeholder. Answers are found again
in the token sequence by character offsets, which hold for every tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmtune import display
from vlmtune.data.feature_tokens import Shortened, repeat, shortened
from vlmtune.data.images import image_size, open_image
from vlmtune.data.records import Record
from vlmtune.data.template import TEXT, Pieces, Shape, Turnout, content_of, conversation, with_stand_ins
from vlmtune.errors import DataError, ModelError
from vlmtune.models.families import family_of
from vlmtune.models.image_budget import enough

if TYPE_CHECKING:
    from vlmtune.models.image_cache import Pixels

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

    A marker of the template (`<|im_end|>`, `<image>`) inside a user's text stays text: its first character is replaced
    by a stand-in that the tokenizer's normalizer turns back after special tokens were looked for.

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
        self.system_prompt = system_prompt
        self.max_image_pixels = max_image_pixels
        self.supervise = supervise
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
        self.tokenizer, self.stand_ins = with_stand_ins(processor.tokenizer, self.markers())
        self._marker = re.compile("|".join(sorted(map(re.escape, self.markers()), key=len, reverse=True)))
        self._known: dict[Shape, Pieces] = {}

    def markers(self) -> list[str]:
        """Strings that mean something else than their letters to the tokenizer or the processor."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        own = {t.content for t in added if t.special}
        own |= {self.family.image_token or "<image>", self.family.feature_token}
        return sorted(own | set(self.family.ends))

    def literal(self, text: str) -> str:
        """`text` with stand-ins, so that no marker in it takes effect."""
        while match := self._marker.search(text):
            at = match.start()
            text = text[:at] + self.stand_ins[text[at]] + text[at + 1 :]
        return text

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the template's own, and the tokenizer's."""
        tail = self.tokenizer(self.pieces((False, ("it",))).tail, add_special_tokens=False)["input_ids"]
        return sorted({tail[-1], self.tokenizer.eos_token_id} - {None})

    @functools.cached_property
    def image_ids(self) -> list[int]:
        """Ids that stand for images: no answer holds one."""
        token = self.tokenizer.convert_tokens_to_ids(self.family.image_token)
        ids = {token, *getattr(self.processor, "image_token_ids", [])} - {None, self.tokenizer.unk_token_id}
        return sorted(i for i in ids if isinstance(i, int))

    # ---------------------------------------------------------------- text

    def pieces(self, shape: Shape) -> Pieces:
        """As `_pieces`, rendered once. A `functools.cache` of it would be a cycle that keeps the model alive."""
        if shape not in self._known:
            self._known[shape] = self._pieces(shape)
        return self._known[shape]

    def _pieces(self, shape: Shape) -> Pieces:
        """Render a conversation of `shape` whose last question is to be answered."""
        messages, kinds = conversation(shape)
        texts = [TEXT.format(number) for number in range(len(kinds))]
        prompt = self._rendered(messages[:-1], add_generation_prompt=True)
        full = self._rendered(messages)
        if any(prompt.count(text) != 1 for text in texts[:-1]) or full.count(texts[-1]) != 1:
            raise ModelError("this model's chat template leaves out or repeats a question or an answer")
        if [prompt.index(text) for text in texts[:-1]] != sorted(prompt.index(text) for text in texts[:-1]):
            raise ModelError("this model's chat template changes the order of texts")
        parts = tuple(re.split("|".join(map(re.escape, texts[:-1])), prompt))
        head, _, tail = full.partition(texts[-1])
        separator = head[len(prompt) :] if head.startswith(prompt) else ""  # the generation prompt wins
        last = Turnout(separator, self._end(tail) or self._own_end())
        end = self._end(tail)  # earlier answers end as the last one does, or in nothing
        earlier = [
            Turnout(
                parts[n].removeprefix(parts[-1]) if parts[n].startswith(parts[-1]) else "",
                end if parts[n + 1].startswith(end) else "",
            )
            for n, kind in enumerate(kinds[:-1])
            if kind == "answer"
        ]
        return Pieces(parts, (*earlier, last))

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise DataError(f"this model's chat template refuses the conversation: {error}") from error

    def _end(self, tail: str) -> str:
        """`tail` up to and with its first marker, or nothing."""
        ends = [marker for marker in self.markers() if marker in tail and marker != self.family.image_token]
        return min((tail[: tail.index(end) + len(end)] for end in ends), key=len, default="")

    def _own_end(self) -> str:
        """The tokenizer's end, or the model never learns to stop (llava-1.5's template writes none)."""
        end = self.processor.tokenizer.eos_token
        if not end:
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer")
        return str(end)

    def pieces_of(self, record: Record) -> Pieces:
        """The template around a row's texts. Raises DataError where it refuses such a conversation."""
        try:
            return self.pieces(self._shape(record))
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from error

    def check(self, record: Record) -> None:
        """Raise DataError where this family can't take such a row, whatever its texts and images hold."""
        if self.family.needs_image and not record.images:
            raise DataError(f"{record.place}: has no image, and {type(self.processor).__name__} takes no text alone")
        self.pieces_of(record)

    def _shape(self, record: Record) -> Shape:
        placed = sum(len(turn.image_at) for turn in record.turns)
        if placed not in (0, len(record.images)):
            raise DataError(f"{record.place}: {len(record.images)} images for {placed} places in the text")
        leading = "i" * (len(record.images) - placed)
        orders = ["".join(kind for kind, _ in content_of(turn)) for turn in record.turns]
        return self._system(record) is not None, (leading + orders[0], *orders[1:])

    def _system(self, record: Record) -> str | None:
        return record.system if record.system is not None else self.system_prompt

    def render(
        self, record: Record, *, answered: bool, expansions: Sequence[str] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a row, and the characters of its supervised parts: separator, answer, end token of each.

        `expansions`: the text that stands for each of the row's images; None leaves placeholders.
        """
        pieces = self.pieces_of(record)
        system, images = self._system(record), iter(expansions or ())
        parts = [self._expanded(part, images) if expansions is not None else part for part in pieces.parts]
        if expansions is not None and next(images, None) is not None:
            raise DataError(f"{record.place}: this model's chat template has no place for one of its images")
        out, spans = parts[0], []
        rest = iter(parts[1:])
        if system is not None:
            out += self.literal(system) + next(rest)
        for number, (turn, around) in enumerate(zip(record.turns, pieces.answers, strict=True)):
            for kind, text in content_of(turn):
                if kind == "t":
                    out += self.literal(text) + next(rest)
            answer = self.literal(turn.answers[0] if turn.answers else "")
            if number < len(record.turns) - 1:
                spans.append((len(out) - len(around.separator), len(out) + len(answer) + len(around.tail)))
                out += answer + next(rest)
            elif answered:
                spans.append((len(out), len(out) + len(around.separator) + len(answer) + len(around.tail)))
                out += around.separator + answer + around.tail
        return out, (spans if self.supervise == "all" else spans[-1:]) if answered else []

    def supervised_texts(self, record: Record) -> list[str]:
        """What a row trains on, as its author wrote it with what the template puts around."""
        text, spans = self.render(record, answered=True)
        letters = str.maketrans({stand_in: first for first, stand_in in self.stand_ins.items()})
        return [text[begin:end].translate(letters) for begin, end in spans]

    def by_the_processor(self, record: Record) -> Any:
        """What the family's processor makes of an answered row by itself, called as its documentation does."""
        text, _ = self.render(record, answered=True)
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

    def _expanded(self, part: str, images: Any) -> str:
        token = self.family.image_token
        if not token:
            return part
        head, *tail = part.split(token)
        return head + "".join(next(images, token) + text for text in tail)

    # ---------------------------------------------------------------- tokens

    def encode(self, records: Sequence[Record], *, answered: bool, images_once: bool = False) -> Encoded:
        """Tokens of `records`, with labels if `answered`; else they end where the answer begins.

        `images_once`: neighbouring rows of one group share their image tensors, which then appear once.
        """
        for record in records:
            self.check(record)
        sources, images_of = _distinct_images(records, images_once)
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
                found += [(self._image_tokens(s), len(ids) - len(s)) for s, ids in zip(sizes, texts, strict=True)]
                advance(len(rows))
        return found

    @functools.cached_property
    def _image_tokens(self) -> Any:
        """Tokens that images of given sizes, shown together, take in a prompt."""

        @functools.lru_cache(maxsize=100_000)
        def count(sizes: tuple[tuple[int, int], ...]) -> int:
            if not sizes:
                return 0
            _, expansions = self.family.images([[Image.new("RGB", size) for size in sizes]])
            ids = self.tokenizer(expansions, add_special_tokens=False)["input_ids"]
            return sum(map(len, ids))

        return count

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids -> answers: without special tokens, and without the template's separator around them."""
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]


def _distinct_images(records: Sequence[Record], once: bool) -> tuple[list[Any], list[list[int]]]:
    """All image sources of the rows in order, those of neighbours in a group only once if `once`; indices per row."""
    sources: list[Any] = []
    images_of: list[list[int]] = []
    before = None
    for record in records:
        if once and record.group is not None and record.group == before:
            images_of.append(images_of[-1])
        else:
            images_of.append(list(range(len(sources), len(sources) + len(record.images))))
            sources += record.images
        before = record.group
    return sources, images_of


def _within(place: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    """Whether a token's characters overlap one of `spans`."""
    begin, end = place
    return end > begin and any(begin < stop and end > start for start, stop in spans)
