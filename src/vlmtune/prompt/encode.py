"""Records -> tokens, labels and image tensors.

The chat template renders each row (`rendering`), the text of each image replaces its placeholder (`image_inputs`), and
the tokens of the answer become labels (`labels`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.errors import DataError, ModelError
from vlmtune.prompt.added_tokens import AddedTokens
from vlmtune.prompt.decoding import AnswerDecoder
from vlmtune.prompt.families import family_of
from vlmtune.prompt.feature_tokens import FeatureTokens
from vlmtune.prompt.image_budget import needed_size
from vlmtune.prompt.image_inputs import ImageCache, ImageProcessing
from vlmtune.prompt.labels import tokens_and_labels
from vlmtune.prompt.lengths import measured
from vlmtune.prompt.placeholders import expanded
from vlmtune.prompt.rendering import Prompt, Spans


@dataclass
class Encoded:
    """Rows that are ready for a batch. Lists have one entry per row unless noted otherwise."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """Token ids where supervised, IGNORE elsewhere."""
    token_types: list[list[int]] | None
    """The type of each token, for families that need it: image or text, prompt or answer."""
    token_types_name: str
    """The model's argument for the token types."""
    images_of: list[list[int]]
    """For each row the indices of its images in the image tensors."""
    image_inputs: dict[str, Any] = field(default_factory=dict)
    """The processor's output for the images, from one call for all of them."""


class Encoder:
    """Encodes records for one model's processor. Immutable; `keeping` returns a changed copy.

    `supervise`: which turns are trained on, the `last` or `all`.
    `fast_jpeg`: whether JPEG files much larger than the model sees are decoded at a reduced size.
    `pad_to_multiple_of`: batches are padded to a multiple of this many tokens.
    """

    def __init__(
        self,
        processor: Any,
        *,
        system_prompt: str | None = None,
        max_image_pixels: int = 100_000_000,
        supervise: str = "last",
        fast_jpeg: bool = True,
        pad_to_multiple_of: int = 1,
    ):
        if not getattr(processor, "chat_template", None):
            raise ModelError(f"{type(processor).__name__} has no chat template, so its prompt format is unknown")
        self.processor, self.pad_to_multiple_of = processor, pad_to_multiple_of
        self.family = family_of(processor)
        self.prompt = Prompt(processor, self.family, system_prompt, supervise)
        self.tokenizer = self.prompt.tokenizer
        needed = needed_size(processor) if fast_jpeg else None
        self.images = ImageProcessing(self.family, self.tokenizer, max_image_pixels, needed)
        self.features = FeatureTokens(self.family.feature_token, self.tokenizer)
        self.added_tokens = AddedTokens(self.tokenizer)
        self.answers = AnswerDecoder(processor, self.prompt)

    @classmethod
    def of(cls, processor: Any, config: Config, *, pad_to_multiple_of: int = 1) -> Encoder:
        """The encoder of a run: `processor` with the config's settings for prompts and images."""
        return cls(
            processor,
            system_prompt=config.model.system_prompt,
            max_image_pixels=config.data.max_image_pixels,
            supervise=config.data.supervise,
            fast_jpeg=config.data.fast_jpeg,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def keeping(self, cache: ImageCache | None) -> Encoder:
        """The same encoder with a cache for the model inputs of images; None: they are computed each time."""
        other = copy.copy(self)
        other.images = self.images.keeping(cache)
        return other

    @property
    def image_cache(self) -> ImageCache | None:
        """The cache for the model inputs of images, if any."""
        return self.images.cache

    # ---------------------------------------------------------------- text

    def check(self, record: Record) -> None:
        """Raise DataError if this family can't process such a row, whatever the content of its texts and images."""
        if self.family.needs_image and not record.images:
            raise DataError(
                f"{record.place}: has no image, and {type(self.processor).__name__} does not accept text-only rows"
            )
        self.prompt.check(record)

    def render(self, record: Record, *, answered: bool, expansions: Sequence[str] | None = None) -> tuple[str, Spans]:
        """The text of a row, and the character spans that are trained on: each answer with its separator and end token.

        `expansions`: the text for each of the row's images; None keeps the placeholders.
        """
        text, spans = self.prompt.of(record, answered=answered)
        if expansions is None:
            return text, spans
        placeholder = self.family.image_token
        if (count := text.count(placeholder) if placeholder else 0) != len(expansions):
            raise DataError(
                f"{record.place}: this model's chat template wrote {count} placeholders for {len(expansions)} images"
            )
        return expanded(text, spans, placeholder or "", expansions)

    def supervised_texts(self, record: Record) -> list[str]:
        """The texts that a row trains on, including what the template adds around them."""
        text, spans = self.render(record, answered=True)
        return [self.prompt.markers.as_written(text[begin:end]) for begin, end in spans]

    def named_tokens(self, record: Record) -> list[int]:
        """Ids of the added tokens that are named in the supervised texts of a row, in order."""
        text, spans = self.render(record, answered=True)
        return [i for begin, end in spans for i in self.added_tokens.named_in(text[begin:end])]

    # ---------------------------------------------------------------- tokens

    def encode(self, records: Sequence[Record], *, answered: bool, images_once: bool = False) -> Encoded:
        """Tokens of `records`. If `answered` with answers and labels, else only up to the start of the last answer.

        `images_once`: neighbouring rows of one `prompt.group` share their image tensors, which appear once.
        """
        for record in records:
            self.check(record)
        groups = [self.prompt.group(record) if images_once else None for record in records]
        tensors, expansions, images_of = self.images.of(records, groups)
        short = [self.features.shortened(expansion) for expansion in expansions]
        texts, spans = [], []
        for record, own in zip(records, images_of, strict=True):
            text, supervised = self.render(record, answered=answered, expansions=[short[i].text for i in own])
            texts.append(text)
            spans.append(supervised)
        ids, labels = tokens_and_labels(self.tokenizer, texts, spans)
        for row, its_labels, own in zip(ids, labels, images_of, strict=True):
            self.features.repeat(row, its_labels, [count for i in own for count in short[i].counts])
        name, types = self.family.token_types(ids, labels) or ("", None)
        return Encoded(ids, labels, types, name, images_of, tensors)

    def lengths(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Number of tokens of each row's images, and of its text with the answer. Only the sizes of images are read."""
        return measured(records, self._with_one_token_per_image, self.images, self.tokenizer)

    def _with_one_token_per_image(self, record: Record) -> str:
        expansions = [self.family.feature_token] * len(record.images)
        return self.render(record, answered=True, expansions=expansions)[0]
