"""Whether an attention that `model.attention` names computes what transformers' own does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from vlmtune.batching.layout import padded
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError
from vlmtune.launch.engine import Engine
from vlmtune.memory import is_out_of_memory
from vlmtune.models import rewrites
from vlmtune.models.chance import without_chance
from vlmtune.models.parts import base_of
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.proof.first_pass import REFUSALS, computes_in_halves

TRUSTED = ("sdpa", "eager", rewrites.ATTENTION)
"""Everything else that a run trains and answers with is compared with the first, or the second."""
ROWS, MULTIPLE = 4, 64
"""Rows to compare, and a length that nearly always leaves padding, whatever their lengths."""


def check_attention(model: Any, encoder: Encoder, records: Sequence[Record], engine: Engine) -> str | None:
    """Raise ConfigError unless the attention gives the loss of sdpa (or eager) on rows padded on the right, as in
    training, and on the left, as in generation. The line for the log; None for an attention that is trusted.

    The other checks compare numbers that were computed with the same attention, so they don't see that one ignores
    padding, or lets tokens attend to later ones.
    """
    base = base_of(model)
    name = str(base.config._attn_implementation)
    if name in TRUSTED:
        return None
    roomy = copy.copy(encoder)
    roomy.pad_to_multiple_of = MULTIPLE
    batches = {side: padded(roomy, records[:ROWS], side=side).to(engine.device) for side in ("right", "left")}
    losses = partial(_losses, model, batches.values(), engine)
    try:
        with without_chance(model):
            _run(name, partial(_backward, model, padded(encoder, records[:1]).to(engine.device), engine))
            found = _run(name, losses)
            with rewrites.attention(model, name, plain := _plain(base)):
                wanted = losses()
    finally:
        model.zero_grad(set_to_none=True)
    allowed = 2e-2 if computes_in_halves(model, engine) else 1e-3
    for side, ours, theirs in zip(batches, found, wanted, strict=True):
        if not abs(ours - theirs) <= allowed * max(abs(theirs), 1e-6):
            raise ConfigError(
                f"model.attention={name}: the loss of rows padded on the {side} is {ours:.6f}, but {plain} computes "
                f"{theirs:.6f} (allowed difference {allowed:.0e}, relative); use auto"
            )
    return f"attention  {name} gives the loss of {plain}, whichever side is padded"


def _plain(base: Any) -> str:
    """What all parts of a model can compute with."""
    able = [module._supports_sdpa for module in base.modules() if hasattr(module, "_supports_sdpa")]
    return "sdpa" if all(able) else "eager"


def _losses(model: Any, batches: Any, engine: Engine) -> list[float]:
    with torch.no_grad(), engine.autocast():
        return [float(summed_loss(model, batch)) for batch in batches]


def _backward(model: Any, batch: Any, engine: Engine) -> None:
    with engine.autocast():
        loss = summed_loss(model, batch)
    loss.backward()


def _run(name: str, compute: Any) -> Any:
    try:
        return compute()
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"model.attention={name}: fails with this model, on this machine"
        raise ConfigError(f"{what}: {reason.rstrip('.')}; use auto") from error
