"""Greedy generation for a batch with shared prefixes: all branches of a row grow by one token per step.

Shapes: B rows, T tokens, K the largest number of branches in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import PADDING, Batch
from vlmtune.models.parts import base_of


@torch.no_grad()
def greedy_branches(
    model: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_token_id: list[int],
    pad_token_id: int,
    suppress_tokens: list[int],
    **_: Any,
) -> list[list[int]]:
    """The most likely tokens after each branch of a shared batch without answers, including the end token.

    The queries of a step are [B, K]; each attends to the prefix, its own branch and its own generated tokens.
    """
    assert batch.branches is not None
    branches = batch.branches  # [B, T], grows by K a step
    numbers = torch.arange(1, int(branches.max()) + 1, device=branches.device)  # [K]
    exists, last = last_indices(branches, numbers)
    out, positions = _prompts(model, batch, last)
    written: list[list[int]] = [[] for _ in range(int(exists.sum()))]
    growing = exists
    for step in range(max_new_tokens):
        logits = out.logits.float()
        logits[..., suppress_tokens] = -torch.inf
        tokens = logits.argmax(-1)  # [B, K]
        for line, token, grows in zip(written, tokens[exists].tolist(), growing[exists].tolist(), strict=True):
            line += [token] * grows
        growing = growing & ~torch.isin(tokens, torch.tensor(eos_token_id, device=tokens.device))
        if step == max_new_tokens - 1 or not growing.any():
            break
        query = torch.where(growing, numbers, PADDING)
        branches = torch.cat([branches, query], dim=1)
        out = model(
            input_ids=torch.where(growing, tokens, pad_token_id),
            attention_mask=_seen(branches, query)[:, None],
            position_ids=positions + step + 1,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return written


def last_indices(branches: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Which branches each row has, and the index of their last tokens; both [B, K]."""
    own = branches[:, None] == numbers[:, None]  # [B, K, T]
    exists = own.any(-1)
    return exists, torch.where(exists, own.int().cumsum(-1).argmax(-1), 0)


def _prompts(model: Any, batch: Batch, last: Tensor) -> tuple[Any, Tensor]:
    """The model's output for the prompts, with logits [B, K, V] only at the indices `last`, and their positions
    [..., B, K].
    """
    inputs = model_inputs(model, batch)
    positions = inputs["position_ids"]
    positions = positions.gather(-1, last.expand(*positions.shape[:-1], -1))
    rows = torch.arange(len(last), device=last.device)[:, None]
    head = base_of(model).get_output_embeddings()
    select = head.register_forward_pre_hook(lambda _, args: (args[0][rows, last], *args[1:]))
    try:
        return model(**{**inputs, "use_cache": True}), positions
    finally:
        select.remove()


def _seen(branches: Tensor, query: Tensor) -> Tensor:
    """[B, K, T]: which tokens each query attends to; the last K tokens are the queries themselves."""
    seen = (branches[:, None] == query[..., None]) | (branches[:, None] == 0)
    seen[..., -query.shape[1] :] |= torch.eye(query.shape[1], dtype=torch.bool, device=branches.device)
    return seen
