"""A batch -> its summed loss. Logits, and the last layer's token-wise modules, are computed for supervised positions
only.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import Batch
from vlmtune.models.parts import base_of


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy summed over the supervised tokens of `batch`, in float32.

    The output embedding and the last layer's token-wise modules get N tokens instead of B x T: an answer has a few
    tokens, an image hundreds.
    """
    if batch.supervised == 0:
        return _nothing(model, batch)
    base = base_of(model)
    width = base.get_output_embeddings().weight.shape[0]
    if batch.supervised * width > MOST_LOGITS and not _after_the_head(base.config):
        return _in_chunks(model, batch, MOST_LOGITS // width or 1)
    logits, targets = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


MOST_LOGITS = 2**26
"""Logits that are held in memory at once: 256 MB in float32, and the same again for their gradient."""


def _after_the_head(config: Any) -> bool:
    """Whether a model changes its logits after the output embedding (Gemma's soft cap, Cohere's scale)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))


def _nothing(model: Any, batch: Batch) -> Tensor:
    """The zero loss of a rank without rows. It still reaches every weight, through the logits of one token."""
    logits, _ = _logits_at(model, batch, batch.places.new_zeros(1))
    return logits.float().sum() * 0.0


def _in_chunks(model: Any, batch: Batch, size: int) -> Tensor:
    """The summed loss with logits for `size` tokens at a time; the backward pass computes them again."""
    unused, hidden = _logits_at(model, batch, batch.places, most=1)
    head = base_of(model).get_output_embeddings()

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    pairs = zip(hidden.split(size), batch.targets.split(size), strict=True)
    losses = [checkpoint(part, states, wanted, use_reentrant=False) for states, wanted in pairs]
    return torch.stack(losses).sum() + unused.float().sum() * 0.0  # keeps DDP's record of which weights are used


def logits_in_pieces(model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """What `supervised_logits` returns, in pieces of at most MOST_LOGITS logits: only one exists at a time.

    Families that change logits after the output embedding compute all of them at once.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    size = MOST_LOGITS // head.weight.shape[0] or 1
    if batch.supervised <= size or _after_the_head(base.config):
        yield supervised_logits(model, batch)
        return
    _, hidden = _logits_at(model, batch, batch.places, most=1)
    for part, wanted in zip(hidden.split(size), batch.targets.split(size), strict=True):
        yield head(part), wanted


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] at the positions that predict a supervised token, and those tokens [N], row by row."""
    return _logits_at(model, batch, batch.places)[0], batch.targets


def _logits_at(model: Any, batch: Batch, places: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [N, V] of the positions `places` [N], of the first `most` of them, and what the output embedding gets for
    all of them [N, D].
    """
    head = base_of(model).get_output_embeddings()
    hidden: list[Tensor] = []

    def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(_at(args[0], places))
        return (hidden[0][None, :most], *args[1:])

    with _serving_only(model, places), _hooked(head.register_forward_pre_hook(select)):
        logits = model(**model_inputs(model, batch)).logits  # [1, N, V]
    return logits[0], hidden[0]


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """[N, D] of a tensor [B, T, D]. A boolean index would wait for the device to count."""
    return tensor.flatten(0, 1).index_select(0, places)


@contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _serving_only(model: Any, places: Tensor) -> AbstractContextManager[None]:
    """Inside the context, the last layer's token-wise modules run only for the tokens at `places` [N].

    Nothing reads the other tokens afterwards: their feed-forward output and projected attention stay zero.
    """
    shapes: list[torch.Size] = []

    def narrow(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append(args[0].shape)
        return (_at(args[0], places)[None], *args[1:])  # [1, N, D]

    def widen(_: Any, args: Any, out: Tensor) -> Tensor:
        rows, length, *_ = shapes.pop()
        whole = out.new_zeros(rows * length, out.shape[-1]).index_copy(0, places, out[0])
        return whole.view(rows, length, -1)

    handles = []
    for module in last_token_wise(base_of(model)):
        handles += [module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)]
    return _hooked(*handles)


def last_token_wise(base: Any) -> list[Any]:
    """Modules of the decoder's last layer that process each token independently: attention's output projection and the
    feed-forward network, by their names in transformers.

    Empty under gradient checkpointing, which runs the layer again when the selection is no longer set. Mixtures of
    experts balance their load over all tokens, so they always get all of them.
    """
    layers = getattr(base.get_decoder(), "layers", None)
    if not layers or (layers[-1].training and getattr(layers[-1], "gradient_checkpointing", False)):
        return []
    feed_forward = getattr(layers[-1], "mlp", None)
    projection = getattr(getattr(layers[-1], "self_attn", None), "o_proj", None)
    return [m for m in (projection, feed_forward) if m is not None and not hasattr(m, "experts")]
