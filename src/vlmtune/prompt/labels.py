"""Rendered texts -> token ids and labels. The tokens' character offsets decide which ones are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vlmtune.prompt.rendering import Spans

IGNORE = -100
"""The label of a token that is not trained on."""


def tokens_and_labels(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of `texts`, and labels: the ids inside the character spans `spans`, IGNORE elsewhere.

    If a token would cross the start of a span (the prompt's last newline and an answer's first), both sides are
    tokenized separately: generation starts from the prompt's own tokens.
    """
    special = adds_special_tokens(tokenizer, texts[0])
    found = tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=special)
    ids, labels = found["input_ids"], []
    for n, (text, own, offsets) in enumerate(zip(texts, spans, found["offset_mapping"], strict=True)):
        if any(begin < start < end for start, _ in own for begin, end in offsets):
            ids[n], row = _tokenized_apart(tokenizer, text, own, special)
        else:
            row = [i if _overlaps(token, own) else IGNORE for i, token in zip(ids[n], offsets, strict=True)]
        labels.append(row)
    return ids, labels


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer has to add its begin token: not if the chat template already wrote it into `text`."""
    bos = tokenizer.bos_token
    return not (bos and bos in text)


def _tokenized_apart(tokenizer: Any, text: str, spans: Spans, special: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of one text, tokenized in pieces that are split at the boundaries of spans."""
    ids: list[int] = []
    labels: list[int] = []
    cuts = sorted({0, len(text), *(at for span in spans for at in span)})
    for begin, end in pairwise(cuts):
        own = tokenizer(text[begin:end], add_special_tokens=special and begin == 0)["input_ids"]
        ids += own
        labels += own if any(start <= begin < stop for start, stop in spans) else [IGNORE] * len(own)
    return ids, labels


def _overlaps(token: tuple[int, int], spans: Spans) -> bool:
    """Whether a token's characters overlap with one of `spans`."""
    begin, end = token
    return end > begin and any(begin < stop and end > start for start, stop in spans)
