"""Records -> tokens, labels and image tensors.

The chat template is rendered once per shape of conversation with stand-ins for the texts; a row's own texts are then
put in between the template's pieces. Answers are found again in the token sequence by character offsets, which hold
for every tokenizer, and across the growth of image placeholders.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.images import open_image
from vlmtune.data.records import Record
from vlmtune.errors import DataError, ModelError

IGNORE = -100
QUESTION, ANSWER = "\u2402question{}\u2402", "\u2402answer{}\u2402"


@dataclass
class Encoded:
    """Rows ready to be put into a batch. Lists have one entry per row unless said otherwise."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """Token ids where supervised, IGNORE elsewhere."""
    token_types: list[list[int]] | None
    """`mm_token_type_ids` (1: image token) for families that need them."""
    images_of: list[list[int]]
    """Indices into the image tensors."""
    image_inputs: dict[str, Any] = field(default_factory=dict)
    """What the image processor returned, one call for all images."""


@dataclass(frozen=True)
class Pieces:
    """A rendered conversation around its texts: `parts[0] + texts[0] + parts[1] + ... `."""

    parts: tuple[str, ...]
    separator: str
    """What the template puts between the generation prompt and an answer."""
    tail: str
    """What ends an answer, up to and with its end token."""


class Encoder:
    """Encodes records for one model's processor.

    A marker of the template (`<|im_end|>`, `<image>`) inside a user's text stays text: its first character is replaced
    by a stand-in that the tokenizer's normalizer turns back after special tokens were looked for.
    """

    def __init__(self, processor: Any, *, system_prompt: str | None = None, max_image_pixels: int = 100_000_000):
        self.processor = processor
        self.system_prompt = system_prompt
        self.max_image_pixels = max_image_pixels
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                f"{type(processor).__name__} has no chat template, so prompts can't be written as it expects"
            )
        self.tokenizer, self.stand_ins = with_stand_ins(processor.tokenizer, self.markers())
        self._marker = re.compile("|".join(sorted(map(re.escape, self.markers()), key=len, reverse=True)))
        self.pieces = functools.cache(self._pieces)

    def markers(self) -> list[str]:
        """Strings that mean something else than their letters to the tokenizer or the processor."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        own = {t.content for t in added if t.special} | {getattr(self.processor, "image_token", None) or "<image>"}
        return sorted(own)

    def literal(self, text: str) -> str:
        """`text` with stand-ins, so that no marker in it takes effect."""
        while match := self._marker.search(text):
            at = match.start()
            text = text[:at] + self.stand_ins[text[at]] + text[at + 1 :]
        return text

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the template's own, and the tokenizer's."""
        tail = self.tokenizer(self.pieces(0, 1).tail, add_special_tokens=False)["input_ids"]
        return sorted({tail[-1], self.tokenizer.eos_token_id} - {None})

    @functools.cached_property
    def image_ids(self) -> set[int]:
        """Ids that stand for image features, of type 1 in `mm_token_type_ids`."""
        return {i for i in self.processor.image_token_ids if i is not None}

    def _pieces(self, images: int, turns: int) -> Pieces:
        """Render a conversation of `turns` questions, the first with `images` images, the last to be answered."""
        tokenizer = self.processor.tokenizer
        messages = conversation(images, turns, self.system_prompt)
        prompt = self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        full = self.processor.apply_chat_template(messages)
        texts = [m.format(i) for i in range(turns) for m in (QUESTION, ANSWER)][:-1]
        head, found, tail = full.partition(ANSWER.format(turns - 1))
        if not found or any(prompt.count(text) != 1 for text in texts):
            raise ModelError("this model's chat template leaves out or repeats a question or an answer")
        separator = head[len(prompt) :] if head.startswith(prompt) else ""  # the generation prompt wins
        ends = [e for e in self.markers() if e in tail]
        if ends:
            tail = min((tail[: tail.index(e) + len(e)] for e in ends), key=len)
        elif tokenizer.eos_token:
            tail = tokenizer.eos_token  # or the model never learns to stop (llava-1.5's template writes none)
        else:
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer")
        return Pieces(tuple(re.split("|".join(map(re.escape, texts)), prompt)), separator, tail)

    def render(self, record: Record, *, answered: bool) -> tuple[str, int]:
        """The text of a row and the character at which its supervised part begins (separator, answer, end token)."""
        pieces = self.pieces(len(record.images), len(record.turns))
        texts = [text for turn in record.turns for text in (turn.question, turn.answers[0] if turn.answers else "")]
        out = pieces.parts[0]
        for text, part in zip(texts, pieces.parts[1:], strict=False):
            out += self.literal(text) + part
        start = len(out)
        if answered:
            out += pieces.separator + self.literal(texts[-1]) + pieces.tail
        return out, start

    def encode(self, records: Sequence[Record], *, answered: bool, images_once: bool = False) -> Encoded:
        """Tokens of `records`, with labels if `answered`; else they end where the answer begins.

        `images_once`: neighbouring rows of one group share their image tensors, which then appear once.
        """
        sources, images_of = _distinct_images(records, images_once)
        image_inputs, expansions = self._process_images(records, sources, images_of)
        texts, starts = [], []
        for record, own in zip(records, images_of, strict=True):
            text, start = self.render(record, answered=answered)
            text, offset = self._expand(text, [expansions[i] for i in own], record)
            texts.append(text)
            starts.append(start + offset)
        ids, labels = self._tokens(texts, starts if answered else [len(text) for text in texts])
        types = [[int(i in self.image_ids) for i in row] for row in ids] if self._needs_token_types else None
        return Encoded(ids, labels, types, images_of, image_inputs)

    def _tokens(self, texts: list[str], starts: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of `texts`, and labels from the character in `starts` on.

        Where a token would hold characters of both sides (the prompt's last newline and an answer's first), the sides
        are tokenized apart: generation starts from the prompt's own tokens.
        """
        bos = self.tokenizer.bos_token
        special = not (bos and texts[0].startswith(bos))
        found = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special)
        ids, labels = found["input_ids"], []
        for n, (text, start, offsets) in enumerate(zip(texts, starts, found["offset_mapping"], strict=True)):
            if any(begin < start < end for begin, end in offsets):
                prompt = self.tokenizer(text[:start], add_special_tokens=special)["input_ids"]
                ids[n] = prompt + self.tokenizer(text[start:], add_special_tokens=False)["input_ids"]
                labels.append([IGNORE] * len(prompt) + ids[n][len(prompt) :])
            else:
                labels.append(_labels(ids[n], offsets, start))
        return ids, labels

    @property
    def _needs_token_types(self) -> bool:
        return bool(getattr(self.processor, "return_mm_token_type_ids", False))

    def _process_images(
        self, records: Sequence[Record], sources: list[Any], images_of: list[list[int]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Image tensors of all distinct images, and the text that stands for each of them in a prompt."""
        if not sources:
            return {}, []
        owner = {index: record for record, own in zip(records, images_of, strict=True) for index in own}
        pictures = []
        for index, source in enumerate(sources):
            try:
                pictures.append(open_image(source, self.max_image_pixels))
            except DataError as error:
                raise DataError(f"{owner[index].place}: {error}") from error
        try:
            inputs = self.processor.image_processor(images=pictures, return_tensors="pt")
        except ValueError as error:  # a shape that the family can't take, such as a strip
            sizes = [f"{owner[i].place} ({p.width}x{p.height})" for i, p in enumerate(pictures)]
            which = sizes[0] if len(sizes) == 1 else f"one of {', '.join(sizes[:8])}"
            raise DataError(f"{which}: the model's processor refuses the image: {error}") from error
        expansions = [self.processor.replace_image_token(inputs, image_idx=i) for i in range(len(pictures))]
        unused = self.processor.unused_input_names
        return {key: value for key, value in inputs.items() if key not in unused}, expansions

    def _expand(self, text: str, expansions: list[str], record: Record) -> tuple[str, int]:
        """Put each image's text in place of its placeholder; also returns how many characters that added.

        All placeholders lie before the answer, since texts of the user can't hold one.
        """
        token = self.processor.image_token
        pieces = text.split(token)
        if len(pieces) != len(expansions) + 1:
            raise DataError(f"{record.place}: {len(expansions)} images for {len(pieces) - 1} places in the prompt")
        out = pieces[0] + "".join(e + p for e, p in zip(expansions, pieces[1:], strict=True))
        return out, len(out) - len(text)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids -> answers: without special tokens, and without the template's separator around them."""
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]


def conversation(images: int, turns: int, system_prompt: str | None) -> list[dict[str, Any]]:
    """Messages in transformers' form with stand-ins for the texts."""
    messages: list[dict[str, Any]] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for i in range(turns):
        pictures = [{"type": "image"}] * (images if i == 0 else 0)
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": QUESTION.format(i)}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER.format(i)}]})
    return messages


def with_stand_ins(tokenizer: Any, markers: list[str]) -> tuple[Any, dict[str, str]]:
    """A copy of `tokenizer` that turns noncharacters back into the first characters of `markers`, and the mapping.

    Special tokens are matched before normalization, so a character restored by the normalizer can't start one; those
    declared the other way (`normalized`, in old Llama files) are declared anew. One character stands for one, so
    offsets stay right.
    """
    from tokenizers import AddedToken, normalizers

    firsts = sorted({marker[0] for marker in markers})
    stand_ins = {first: chr(0xFDD0 + n) for n, first in enumerate(firsts)}  # noncharacters: never in exchanged text
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    late = [token for token in backend.get_added_tokens_decoder().values() if token.normalized]
    backend.add_special_tokens(
        [
            AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            for t in late
            if t.content in markers
        ]
    )
    steps = [normalizers.Replace(stand_in, first) for first, stand_in in stand_ins.items()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer, stand_ins


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


def _labels(ids: list[int], offsets: list[tuple[int, int]], start: int) -> list[int]:
    """`ids` from the first token that overlaps the characters from `start` on, IGNORE before."""
    return [i if end > start and end > begin else IGNORE for i, (begin, end) in zip(ids, offsets, strict=True)]
