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
from vlmtune.prompt.labels import IGNORE


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy summed over the supervised tokens of `batch`, in float32.

    The output embedding and the last layer's token-wise modules get N tokens instead of B x T: an answer has a few
    tokens, an image hundreds.
    """
    supervised = batch.supervised
    if supervised == 0:  # this rank has no rows: a zero loss that still reaches every weight
        return model(**model_inputs(model, batch)).logits.float().sum() * 0.0
    base = base_of(getattr(model, "module", model))
    width = base.get_output_embeddings().weight.shape[0]
    if supervised * width > MOST_LOGITS and not _after_the_head(base.config):
        return _in_chunks(model, batch, MOST_LOGITS // width or 1)
    logits, targets = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


MOST_LOGITS = 2**26
"""Logits that are held in memory at once: 256 MB in float32, and the same again for their gradient."""


def _after_the_head(config: Any) -> bool:
    """Whether a model changes its logits after the output embedding (Gemma's soft cap, Cohere's scale)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))


def _in_chunks(model: Any, batch: Batch, size: int) -> Tensor:
    """The summed loss with logits for `size` tokens at a time; the backward pass computes them again."""
    head, states, targets, unused = _in_front_of_the_head(model, batch)

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    pairs = zip(states.split(size), targets.split(size), strict=True)
    losses = [checkpoint(part, states, wanted, use_reentrant=False) for states, wanted in pairs]
    return torch.stack(losses).sum() + unused.float().sum() * 0.0  # keeps DDP's record of which weights are used


def _in_front_of_the_head(model: Any, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The output embedding, its inputs [N, D] that predict a supervised token, those tokens [N], and the logits
    [B, 1, V] that the model computes meanwhile.
    """
    targets, chosen = _targets(batch)
    head = base_of(getattr(model, "module", model)).get_output_embeddings()
    hidden: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0][chosen])  # [N, D]
        return (args[0][:, :1], *args[1:])

    with _serving_only(model, chosen), _hooked(head.register_forward_pre_hook(keep)):
        unused = model(**model_inputs(model, batch)).logits
    return head, hidden[0], targets[chosen], unused


def logits_in_pieces(model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """What `supervised_logits` returns, in pieces of at most MOST_LOGITS logits: only one exists at a time.

    Families that change logits after the output embedding compute all of them at once.
    """
    base = base_of(getattr(model, "module", model))
    size = MOST_LOGITS // base.get_output_embeddings().weight.shape[0] or 1
    if batch.supervised <= size or _after_the_head(base.config):
        yield supervised_logits(model, batch)
        return
    head, states, targets, _ = _in_front_of_the_head(model, batch)
    for part, wanted in zip(states.split(size), targets.split(size), strict=True):
        yield head(part), wanted


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """The target of each position [B, T], and whether it is supervised."""
    targets = torch.full_like(batch.labels, IGNORE)
    targets[:, :-1] = batch.labels[:, 1:]
    return targets, targets != IGNORE


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] at the positions that predict a supervised token, and those tokens [N], row by row."""
    targets, chosen = _targets(batch)
    head = base_of(getattr(model, "module", model)).get_output_embeddings()
    select = head.register_forward_pre_hook(lambda _, args: (args[0][chosen][None], *args[1:]))
    with _serving_only(model, chosen), _hooked(select):
        logits = model(**model_inputs(model, batch)).logits  # [1, N, V]
    return logits[0], targets[chosen]


@contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _serving_only(model: Any, chosen: Tensor) -> AbstractContextManager[None]:
    """Inside the context, the last layer's token-wise modules run only for the tokens `chosen` [B, T].

    Nothing reads the other tokens afterwards: their feed-forward output and projected attention stay zero.
    """

    def narrow(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][chosen][None], *args[1:])  # [1, N, D]

    def widen(_: Any, args: Any, out: Tensor) -> Tensor:
        whole = out.new_zeros(*chosen.shape, out.shape[-1])
        whole[chosen] = out[0]
        return whole

    handles = []
    for module in last_token_wise(base_of(getattr(model, "module", model))):
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
