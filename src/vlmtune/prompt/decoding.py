"""Generated token ids -> answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vlmtune.prompt.rendering import ONE_QUESTION, Prompt


class AnswerDecoder:
    """Decodes generated tokens, and knows which tokens end an answer and which ones must not occur in it."""

    def __init__(self, processor: Any, prompt: Prompt):
        self.processor, self.prompt = processor, prompt

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the chat template's own, and the tokenizer's."""
        tokenizer = self.prompt.tokenizer
        ending = self.prompt.ending(ONE_QUESTION).marker or self.prompt.own_end()
        tail = tokenizer(ending, add_special_tokens=False)["input_ids"]
        return sorted({tail[-1], tokenizer.eos_token_id} - {None})

    @functools.cached_property
    def image_ids(self) -> list[int]:
        """Ids of image tokens: an answer must not contain them."""
        tokenizer = self.prompt.tokenizer
        token = tokenizer.convert_tokens_to_ids(self.prompt.family.image_token)
        ids = {token, *getattr(self.processor, "image_token_ids", [])} - {None, tokenizer.unk_token_id}
        return sorted(i for i in ids if isinstance(i, int))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Decoded answers without control tokens and without the template's separators around them."""
        kept = [[i for i in row if i not in self._special or not self._is_control(i)] for row in ids]
        texts = self.processor.tokenizer.batch_decode(kept, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {i: t.content for i, t in self.processor.tokenizer.added_tokens_decoder.items() if t.special}

    def _is_control(self, token_id: int) -> bool:
        return self.prompt.markers.is_control(self._special[token_id])
