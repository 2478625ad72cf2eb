"""One answer, written while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from vlmtune.batching.layout import padded
from vlmtune.config.schema import GenerationConfig
from vlmtune.data.records import Record
from vlmtune.errors import DataError
from vlmtune.evaluation.generate import generation_arguments
from vlmtune.serve.sides import Side

HALF = "\ufffd"
"""What a tokenizer writes for a character whose bytes are not all there yet."""


@dataclass(frozen=True)
class Answered:
    """What is known of an answer at its end."""

    text: str
    tokens: int
    seconds: float
    is_cut: bool
    """Whether it ended because it reached the most tokens, not because the model ended it."""


class Streamer(BaseStreamer):  # type: ignore[misc]
    """Gets the tokens of one answer from `generate`, and passes on its text so far whenever it has changed.

    What `on_text` or `before_token` raises ends the generation.
    """

    def __init__(self, side: Side, on_text: Callable[[str], None], before_token: Callable[[], None]):
        self.decode, self.on_text, self.before_token = side.encoder.answers.decode, on_text, before_token
        self.ids: list[int] | None = None  # until the prompt was passed
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """The prompt's tokens first, then each token of the answer."""
        self.before_token()
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._pass_on(self.decode([self.ids])[0].rstrip(HALF))

    def end(self) -> None:
        """The answer is complete, with the bytes of a character that stays a half one."""
        self._pass_on(self.decode([self.ids or []])[0])

    def _pass_on(self, text: str) -> None:
        if text != self.text:
            self.text = text
            self.on_text(text)


@torch.no_grad()
def stream(
    side: Side,
    record: Record,
    generation: GenerationConfig,
    seed: int,
    on_text: Callable[[str], None],
    before_token: Callable[[], None],
) -> Answered:
    """Answer the last question of `record`, as `evaluation.generate` does but for beams, which can't be streamed.

    `on_text` gets the text so far; `before_token` is called before each token and may raise to end the generation.

    Raises DataError where the conversation doesn't fit into the model's context, or its images can't be used.
    """
    began = time.perf_counter()
    before_token()
    batch = padded(side.encoder, [record], answered=False, side="left").to(side.engine.device)
    _refuse_long(batch.input_ids.shape[1], generation.max_new_tokens, side.positions)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.inputs}
    arguments: dict[str, Any] = generation_arguments(generation, side.encoder, side.model) | {"num_beams": 1}
    streamer = Streamer(side, on_text, before_token)
    torch.manual_seed(seed)
    with side.at_work():
        side.model.generate(use_cache=True, synced_gpus=False, streamer=streamer, **inputs, **arguments)
    ids = streamer.ids or []
    is_cut = len(ids) >= generation.max_new_tokens and ids[-1] not in arguments["eos_token_id"]
    return Answered(streamer.text, len(ids), time.perf_counter() - began, is_cut)


def _refuse_long(tokens: int, most_new: int, positions: int | None) -> None:
    if positions is not None and tokens + most_new > positions:
        raise DataError(
            f"the conversation has {tokens} tokens and its answer may have {most_new}; the model takes {positions} "
            "together: start a new conversation, or allow fewer tokens"
        )
