"""Loss and gradients of the same rows, computed in two ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from vlmtune.batching.layout import Batch
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.memory import is_out_of_memory
from vlmtune.models.chance import without_chance
from vlmtune.objectives.next_token import summed_loss
from vlmtune.proof.first_pass import REFUSALS, computes_in_halves

Verdict = tuple[bool, str]
"""Whether another way of computing can be used, and the evidence or the reason."""
Batches = Sequence[Callable[[], Batch]]
"""Makes the batches of one way, in whose passes gradients add up: one, or pieces of it."""
COMPARED = 20_000_000
"""The most gradient entries to compare: those of the smallest tensors, which all depend on the attention."""


class Comparison:
    """Sums up what the plain way gives, then takes away what the other way gives.

    Both run as training does, without chance. The difference of the gradients arises in the parameters themselves, so
    that there is one set of gradients at any time; those that are not compared are dropped as they arise.
    """

    def __init__(self, model: Any, engine: Engine):
        self.model, self.engine = model, engine
        trained = sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel)
        sizes = accumulate(p.numel() for p in trained)
        self.compared = [p for p, size in zip(trained, sizes, strict=True) if size <= COMPARED] or trained[:1]
        self.others = trained[len(self.compared) :]
        self.loss = self.norm = 0.0

    @contextmanager
    def running(self) -> Iterator[Comparison]:
        """The context that both ways run in; afterwards, the model is as before and has no gradients."""
        handles = [p.register_post_accumulate_grad_hook(_drop) for p in self.others]
        try:
            self.model.zero_grad(set_to_none=True)
            with without_chance(self.model):
                yield self
        finally:
            self.model.zero_grad(set_to_none=True)
            for handle in handles:
                handle.remove()

    def plain(self, batches: Batches) -> None:
        """The plain way."""
        self.loss = sum(self._passed(make(), 1.0) for make in batches)
        self.norm = self._gradient_norm()

    def other(self, batches: Batches) -> Verdict:
        """The other way. Returns whether both gave the same up to rounding, and the measured differences."""
        allowed = 5e-2 if computes_in_halves(self.model, self.engine) else 1e-3
        loss = sum(self._passed(make(), -1.0) for make in batches)
        loss_gap = abs(self.loss - loss) / max(abs(self.loss), 1e-6)
        gradient_gap = self._gradient_norm() / max(self.norm, 1e-12)
        found = f"loss differs by {loss_gap:.1e}, gradients by {gradient_gap:.1e} (relative; allowed {allowed:.0e})"
        return loss_gap <= allowed and gradient_gap <= allowed, found

    def _passed(self, batch: Batch, weight: float) -> float:
        """The summed loss of a batch; adds `weight` times its gradient to the parameters'."""
        with self.engine.autocast():
            loss = summed_loss(self.model, batch.to(self.engine.device))
        (weight * loss).backward()
        return float(loss.detach())

    def _gradient_norm(self) -> float:
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.compared if p.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0


def same_result(model: Any, engine: Engine, plain: Batches, other: Batches) -> Verdict:
    """The verdict on two forms of the same rows."""
    with Comparison(model, engine).running() as both:
        both.plain(plain)
        return both.other(other)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def attempted(compare: Callable[[], Verdict], name: str) -> Verdict:
    """The verdict, or why there is none: the model does not support `name`, or memory is short."""
    try:
        return compare()
    except REFUSALS as error:
        short = is_out_of_memory(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not short:
        return False, f"this model does not support {name} ({reason})"
    session.free_memory()  # only now: the error kept the tensors of the pass
    return False, f"out of memory while trying {name}"


def agreed(verdict: Verdict, engine: Engine) -> Verdict:
    """The same verdict on every rank: yes where all say yes."""
    fits, evidence = verdict
    if session.all_ranks(fits, engine):
        return verdict
    return False, evidence if not fits else "another process found a difference, or had too little memory"
