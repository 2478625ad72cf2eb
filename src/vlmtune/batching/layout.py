"""Encoded rows -> tensors, in two layouts that give the same loss.

Padded: one row of the batch per record. Shared: one row per image, with the image's tokens once (the prefix), then each
record's own tokens as a branch. A branch attends to the prefix and to itself; its positions continue from the prefix.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.data.records import Record
from vlmtune.prompt.encode import Encoded, Encoder
from vlmtune.prompt.labels import IGNORE

PADDING = -1


@dataclass(frozen=True)
class Layout:
    """The batch layout of a run, chosen at its start."""

    share: bool = False
    """Whether records that show the same image become one row of a batch."""
    share_answers: bool = False
    """Whether generation in evaluation shares images too."""
    reason: str = ""

    @property
    def sentence(self) -> str:
        return f"batches    {'shared, each image once' if self.share else 'padded, one row each'} ({self.reason})"


PLAIN = Layout()


@dataclass
class Batch:
    """The input of one forward pass. It is made on the CPU, where it is counted, and then moved: nothing that is known
    in advance is read back from the device.

    N: supervised positions, those whose next token has a label.
    """

    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor
    """[B, T], 1 for tokens, 0 for padding."""
    labels: Tensor
    """[B, T], IGNORE where a token is not trained on."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """All other arguments of the model: what the processor returned, and what `Preparation` added."""
    branches: Tensor | None = None
    """[B, T] in the shared layout: 0 for the prefix, 1, 2, ... for each record's branch, PADDING."""
    rows: int = 0
    """Records in the batch."""
    ends_step: bool = True
    """Whether it is this process's last micro-batch of an optimizer step."""
    on_host: frozenset[str] = frozenset()
    """Names of `inputs` that stay on the CPU, where the model reads their values."""
    places: Tensor = field(init=False)
    """[N], the supervised positions, counted through all rows: row x T + position."""
    targets: Tensor = field(init=False)
    """[N], the tokens that follow them."""
    tokens: int = field(init=False)
    """Number of tokens without padding."""

    def __post_init__(self) -> None:
        following = F.pad(self.labels[:, 1:], (0, 1), value=IGNORE).flatten()
        self.places = (following != IGNORE).nonzero()[:, 0]
        self.targets = following[self.places]
        self.tokens = int((self.attention_mask != 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`, except those of `on_host`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> Batch:
        """The batch with its tensors in shared memory. Raises RuntimeError if that is full."""
        return self._each(lambda tensor: tensor.share_memory_())

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        """A copy with each tensor changed, without counting again."""
        changed = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(changed, name, change(value))
        changed.inputs = {name: value if name in self.on_host else change(value) for name, value in self.inputs.items()}
        return changed

    @property
    def supervised(self) -> int:
        """Number of tokens in the loss: labels that a previous token predicts."""
        return len(self.targets)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens including padding."""
        return self.input_ids.numel()

    @property
    def bytes(self) -> int:
        """Size of the input ids, masks, labels and image tensors."""
        own = [*vars(self).values(), *self.inputs.values()]
        return sum(value.nbytes for value in own if isinstance(value, Tensor))

    def without_labels(self) -> Batch:
        """The same batch without labels: a rank without rows of its own runs it so that the other ranks don't wait."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=0)


def lay_out(encoder: Encoder, records: Sequence[Record], layout: Layout) -> Batch:
    """A batch of these rows in the run's layout."""
    return (shared if layout.share else padded)(encoder, records)


def padded(encoder: Encoder, records: Sequence[Record], *, answered: bool = True, side: str = "right") -> Batch:
    """One row per record. Training pads on the right, generation on the left."""
    encoded = encoder.encode(records, answered=answered)
    stack = partial(_stack, side=side, multiple=encoder.pad_to_multiple_of)
    ids = stack(encoded.input_ids, encoder.tokenizer.pad_token_id or 0)
    inputs = encoder.family.arrange(encoded.image_inputs, ids, encoded.images_of)
    if encoded.token_types is not None:
        inputs = {**inputs, encoded.token_types_name: stack(encoded.token_types, 0)}
    return Batch(
        ids,
        stack([[1] * len(row) for row in encoded.input_ids], 0),
        stack(encoded.labels, IGNORE),
        inputs,
        rows=len(records),
    )


def shared(encoder: Encoder, records: Sequence[Record], *, answered: bool = True) -> Batch:
    """One row per run of consecutive records whose prompts are the same up to the last image.

    Raises ValueError for families that don't support this layout.
    """
    if not encoder.family.shares_prefix:
        raise ValueError(f"{type(encoder.processor).__name__}: an image's tokens depend on the question")
    encoded = encoder.encode(records, answered=answered, images_once=True)
    keys = [("alone", n) if (group := encoder.prompt.group(r)) is None else group for n, r in enumerate(records)]
    runs = [list(run) for _, run in groupby(range(len(records)), key=keys.__getitem__)]
    rows = [_branched(encoded, run) for run in runs]
    inputs = dict(encoded.image_inputs)
    stack = partial(_stack, side="right", multiple=encoder.pad_to_multiple_of)
    branches = stack([row["branches"] for row in rows], PADDING)
    if encoded.token_types is not None:
        inputs[encoded.token_types_name] = stack([row["token_types"] for row in rows], 0)
    return Batch(
        stack([row["input_ids"] for row in rows], encoder.tokenizer.pad_token_id or 0),
        (branches != PADDING).long(),
        stack([row["labels"] for row in rows], IGNORE),
        inputs,
        branches,
        len(records),
    )


def _branched(encoded: Encoded, run: list[int]) -> dict[str, list[int]]:
    """One row of the shared layout from the records `run`. A single answered record is all prefix, because its later
    images may follow labels and need the positions that the model computes.
    """
    ids, labels = [encoded.input_ids[i] for i in run], [encoded.labels[i] for i in run]
    alone = len(run) == 1 and any(label != IGNORE for label in labels[0])
    length = len(ids[0]) if alone else prefix_length(ids, labels)
    row = {
        "input_ids": ids[0][:length],
        "labels": labels[0][:length],
        "branches": [0] * length,
        "token_types": encoded.token_types[run[0]][:length] if encoded.token_types else [],
    }
    for number, index in enumerate(run, start=1):
        row["input_ids"] += encoded.input_ids[index][length:]
        row["labels"] += encoded.labels[index][length:]
        row["branches"] += [number] * (len(encoded.input_ids[index]) - length)
        if encoded.token_types:
            row["token_types"] += encoded.token_types[index][length:]
    return row


def prefix_length(ids: list[list[int]], labels: list[list[int]]) -> int:
    """Number of tokens that all rows begin with, and that predict no label in any of them.

    In the layout, the token before a branch's first token is the last one of another branch, so a branch's first
    token must not have a label: the prefix ends at least one token before the first supervised one.
    """
    unsupervised = min(next((n for n, label in enumerate(row) if label != IGNORE), len(row)) for row in labels)
    longest = min(unsupervised, *(len(row) for row in ids)) - 1
    for n in range(longest):
        if len({row[n] for row in ids}) > 1:
            return n
    return max(longest, 0)


def branch_mask(branches: Tensor) -> Tensor:
    """[B, 1, T, T], True where a query (dim 2) may attend to a key (dim 3): prefix or own branch, never later tokens.

    Padding attends to itself, so that every row of the softmax has an entry.
    """
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    query, key = branches[:, :, None], branches[:, None, :]
    own = (key == query) | ((key == 0) & (query != PADDING))
    return (own & causal)[:, None]


def branch_positions(prefix_positions: Tensor, branches: Tensor) -> Tensor:
    """Positions [..., B, T] of all tokens, given those [..., B, T] of the prefixes: each branch continues the prefix.

    `prefix_positions`: entries outside the prefix are ignored. Branches count the same on all leading axes (mRoPE's 3).
    """
    in_prefix = branches == 0
    last = prefix_positions.masked_fill(~in_prefix, -1).amax(-1, keepdim=True)  # [..., B, 1]
    while last.dim() > 2:
        last = last.amax(0)  # text continues from the largest position on any axis
    step = torch.ones_like(branches)
    counted = step.cumsum(1)
    starts = torch.ones_like(branches, dtype=torch.bool)
    starts[:, 1:] = branches[:, 1:] != branches[:, :-1]
    since_start = counted - (counted * starts).cummax(1).values  # 0 at the first token of each branch
    return torch.where(in_prefix, prefix_positions, last + 1 + since_start)


def _stack(rows: list[list[int]], value: int, *, side: str, multiple: int) -> Tensor:
    length = -(-max(map(len, rows)) // multiple) * multiple
    pad = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([p + row if side == "left" else row + p for p, row in zip(pad, rows, strict=True)])
