"""What a model can't take of a row: its texts, its images, its length."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.audit import keys_of
from vlmtune.data.records import Record
from vlmtune.errors import DataError, ModelError
from vlmtune.models.parts import base_of
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.template import Shape, conversation

Sizes = tuple[tuple[int, int], ...]
"""Width and height of each image of a row."""


@dataclass(frozen=True)
class Limits:
    """The limits of a model."""

    positions: int | None
    """The most tokens in a row; None if the model sets no limit."""
    embeddings: int
    """Number of token ids that have an embedding."""


def limits_of(model: Any) -> Limits:
    """The limits of a model, from its text config and its input embedding."""
    text = base_of(model).config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions and (factor := rope.get("factor")):  # an extended context
        positions = max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))
    embedding = base_of(model).get_input_embeddings()
    extra = getattr(embedding, "additional_embedding", None)  # Idefics keeps the embeddings of its last ids separately
    return Limits(positions, embedding.weight.shape[0] + (0 if extra is None else extra.weight.shape[0]))


class RowChecker:
    """Finds rows that the model can't process. Cheap bounds come first; only few rows are tokenized."""

    def __init__(self, encoder: Encoder, limits: Limits):
        self.encoder, self.limits = encoder, limits
        added = encoder.tokenizer.get_added_vocab()
        feature = encoder.family.feature_token  # models replace its embedding by the image's features
        beyond = [token for token, number in added.items() if number >= limits.embeddings and token != feature]
        self.beyond = re.compile("|".join(sorted(map(re.escape, beyond), key=len, reverse=True))) if beyond else None
        self.around = functools.cache(self._around)
        self.refusal = functools.cache(self._refusal)
        self.seen: dict[Hashable, tuple[int, int]] = {}

    def check_tokenizer(self) -> None:
        """Raise ModelError if tokens that every row contains have no embedding."""
        base = self.encoder.tokenizer.vocab_size
        end = max(self.encoder.answers.end_ids)
        if base > self.limits.embeddings or end >= self.limits.embeddings:
            raise ModelError(
                f"the tokenizer has {max(base, end + 1)} tokens, but the model's embedding only "
                f"{self.limits.embeddings} rows: the tokenizer does not belong to this checkpoint, or the embedding "
                "was not resized (model.resize_token_embeddings) before the checkpoint was saved"
            )

    def check_all(self, records: Sequence[Record]) -> tuple[dict[int, str], list[int]]:
        """The reason against each bad row, by row number, and an upper bound on the tokens of each row."""
        reasons: dict[int, str] = {}
        shown: list[Sizes] = []
        texts: list[int] = []
        for number, record in enumerate(records):
            try:
                self.encoder.check(record)
                sizes = tuple(self._size(key, image) for key, image in zip(keys_of(record), record.images, strict=True))
                if self.beyond and (fault := self._beyond(record)):
                    raise DataError(fault)
                shown.append(sizes)
                texts.append(self._text_bound(record))
            except DataError as error:
                reasons[number] = _bare(record, error)
                shown.append(())
                texts.append(0)
        refused, cost = self._probe(Counter(sizes for sizes in shown if sizes))
        reasons |= {n: refused[sizes] for n, sizes in enumerate(shown) if sizes in refused}
        bounds = [text + cost(sizes) for text, sizes in zip(texts, shown, strict=True)]
        reasons |= self._too_long(records, [n for n in range(len(bounds)) if n not in reasons], bounds)
        return reasons, bounds

    def faults_of(self, record: Record) -> list[str]:
        """As `check_all`, for one row."""
        return list(self.check_all([record])[0].values())

    # ---------------------------------------------------------------- one row

    def _size(self, key: Hashable, source: Any) -> tuple[int, int]:
        """`key`: equal for images that are copies of each other, None if unknown."""
        size = self.seen.get(key) or self.encoder.images.size(source)
        if key is not None:
            self.seen[key] = size
        return size

    def _beyond(self, record: Record) -> str | None:
        """Which token of a row's texts has no embedding, if any."""
        assert self.beyond
        for text in texts_of(record):
            if found := self.beyond.search(self.encoder.prompt.markers.literal(text)):
                number = self.encoder.tokenizer.convert_tokens_to_ids(found[0])
                rows = self.limits.embeddings
                return f"token without an embedding: {found[0]!r} has id {number}, the model's embedding {rows} rows"
        return None

    def _text_bound(self, record: Record) -> int:
        """An upper bound on the tokens of a row's text: a token has at least one byte."""
        size = sum(len(text) if text.isascii() else len(text.encode(errors="replace")) for text in texts_of(record))
        return size + self.around(self.encoder.prompt.shape(record))

    def _around(self, shape: Shape) -> int:
        """Bytes that the template adds to the texts of such a row, including its default system prompt."""
        prompt = self.encoder.prompt
        system = len((prompt.system_prompt or "").encode())
        return len(prompt.rendered(conversation(shape)[0]).encode()) + system

    # ---------------------------------------------------------------- images

    def _refusal(self, sizes: Sizes) -> str | None:
        """Why the processor refuses images of these sizes; None if it accepts them."""
        try:
            self.encoder.images.tokens(sizes)
        except (ValueError, ZeroDivisionError) as error:
            shown = ", ".join(f"{width}x{height}" for width, height in sizes)
            return f"the model's processor refuses the image ({shown}): {str(error).splitlines()[0]}"
        return None

    def _probe(self, counts: Counter[Sizes]) -> tuple[dict[Sizes, str], Any]:
        """Sizes that the processor refuses, with the reason, and a bound on the tokens of the others.

        Up to `PROBED` sizes are all tried, with blank images. If there are more, the thinnest and the smallest are
        tried until one is accepted, and a sample of sizes is measured: twice its maximum bounds the others.
        """
        distinct = sorted(counts, key=_area)
        few = len(distinct) <= PROBED
        spread = distinct if few else [distinct[n * (len(distinct) - 1) // (PROBED - 1)] for n in range(PROBED)]
        refused = {sizes: reason for sizes in spread if (reason := self.refusal(sizes))}
        for order in () if few else (sorted(distinct, key=_thinness, reverse=True), sorted(distinct, key=_least)):
            for sizes in order:
                if not (reason := self.refusal(sizes)):
                    break
                refused[sizes] = reason
        known = {sizes: self.encoder.images.tokens(sizes) for sizes in spread if sizes not in refused}
        dearest = max((-(-tokens // len(sizes)) for sizes, tokens in known.items()), default=0)

        def cost(sizes: Sizes) -> int:
            return known[sizes] if sizes in known else 2 * dearest * len(sizes)

        return refused, cost

    # ---------------------------------------------------------------- length

    def _too_long(self, records: Sequence[Record], rows: Sequence[int], bounds: Sequence[int]) -> dict[int, str]:
        """Reasons against rows with more tokens than the model's context."""
        most = self.limits.positions
        near = [n for n in rows if most and bounds[n] > most]
        lengths = self.encoder.lengths([records[n] for n in near]) if near else []
        return {
            n: f"row longer than the model's context: {image + text} tokens ({image} for images), limit {most}"
            for n, (image, text) in zip(near, lengths, strict=True)
            if image + text > (most or 0)
        }


PROBED = 16
"""Up to this many image sizes are all tried."""


def _bare(record: Record, error: DataError) -> str:
    """The error message without the row's place, which is reported separately."""
    return "; ".join(problem.removeprefix(f"{record.place}: ") for problem in error.problems)


def _area(sizes: Sizes) -> int:
    return sum(width * height for width, height in sizes)


def _thinness(sizes: Sizes) -> float:
    return max(max(size) / max(min(size), 1) for size in sizes)


def _least(sizes: Sizes) -> int:
    return min(map(min, sizes))


def texts_of(record: Record) -> list[str]:
    system = [] if record.system is None else [record.system]
    return system + [text for turn in record.turns for text in (turn.question, *turn.answers[:1])]
