"""Answers that the forward pass of the loss already reveals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmtune.batching.layout import Batch
from vlmtune.config.schema import GenerationConfig
from vlmtune.data.records import Record
from vlmtune.evaluation.generate import generation_arguments, is_plain_greedy
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.labels import IGNORE


class Draft:
    """Finds the rows whose greedy answer is the reference itself, from the forward pass that gives the loss.

    If the most likely token equals the reference's token at every position of the answer, including its end token,
    greedy generation would write exactly that. This is speculative decoding with the reference as the draft, so the
    answers are the same as with generation; rows that differ anywhere are generated.
    """

    def __init__(self, model: Any, encoder: Encoder, generation: GenerationConfig):
        arguments = generation_arguments(generation, encoder, model)
        self.encoder = encoder
        self.usable = is_plain_greedy(arguments, model)
        self.ends = set(arguments["eos_token_id"])
        self.never = arguments["suppress_tokens"]
        self.longest = generation.max_new_tokens

    def answers(self, records: Sequence[Record], batch: Batch, likely: list[int]) -> list[str | None]:
        """The answer of each record of `batch`, None if it must be generated. `likely`: the token that greedy search
        would write at each supervised position, row by row.
        """
        if not self.usable:
            return [None] * len(records)
        rows = torch.arange(len(batch.labels))[:, None].expand_as(batch.labels)
        owners = rows if batch.branches is None else rows * (int(batch.branches.max()) + 1) + batch.branches.cpu()
        labels = batch.labels[:, 1:].cpu()
        supervised = labels != IGNORE
        found: dict[int, list[tuple[int, int]]] = {}
        for owner, target, token in zip(
            owners[:, 1:][supervised].tolist(), labels[supervised].tolist(), likely, strict=True
        ):
            found.setdefault(owner, []).append((target, token))
        return [self._answer(record, found[owner]) for record, owner in zip(records, sorted(found), strict=True)]

    def _answer(self, record: Record, pairs: list[tuple[int, int]]) -> str | None:
        targets = [target for target, _ in pairs]
        whole = len(record.turns) == 1 and len(targets) <= self.longest and targets[-1] in self.ends
        if not whole or self.ends & set(targets[:-1]) or any(target != token for target, token in pairs):
            return None
        return self.encoder.answers.decode([targets])[0]
