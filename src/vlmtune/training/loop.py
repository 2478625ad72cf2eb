"""The training loop: torch only, everything else is passed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vlmtune.record.progress import Progress


@dataclass
class StepReport:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean over the supervised tokens of all ranks and micro-batches."""
    gradient_norm: float
    learning_rate: float
    examples: int
    tokens: int
    seconds: float
    padding_share: float
    """Share of the computed tokens that are padding."""
    waited: float
    """Seconds of these in which the step waited for its data."""


class Engine(Protocol):
    """What the loop needs of accelerate.Accelerator."""

    device: torch.device
    num_processes: int

    def backward(self, loss: torch.Tensor) -> None: ...
    def no_sync(self, model: Any) -> Any: ...
    def autocast(self) -> Any: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any: ...
    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor: ...


class NonFinite(Exception):
    """The loss or the gradient is NaN or infinite, and the run is to stop."""


@dataclass
class Hooks:
    """What happens around steps; each may be left out."""

    after_step: Callable[[StepReport], None] = lambda report: None
    """Called after each optimizer step: logging, evaluation, checkpoints."""
    before_zero_grad: Callable[[int], None] = lambda step: None
    """Called with the step's number, from 1, while its gradients are still there."""
    penalty: Callable[[], torch.Tensor | None] = lambda: None
    """A term added to the mean loss once per optimizer step."""
    stop: Callable[[], bool] = field(default=lambda: False)
    """Asked after each step on every rank; True ends the training."""


def fit(
    model: Any,
    steps: Iterable[list[Any]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    engine: Engine,
    summed_loss: Callable[[Any, Any], torch.Tensor],
    progress: Progress,
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    hooks: Hooks,
) -> None:
    """Train on `steps`: each is this rank's list of micro-batches for one optimizer step.

    Every supervised token weighs the same, however a step is cut into micro-batches and ranks: losses are summed and
    divided by the count of supervised tokens over all of them. Raises NonFinite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    iterator = iter(steps)
    in_a_row = 0
    model.train()  # evaluation between steps puts it back into this mode
    while True:
        began = time.perf_counter()
        batches = next(iterator, None)
        if batches is None:
            return
        waited = time.perf_counter() - began
        counts = _count(batches, engine)
        loss = _forward_backward(model, batches, counts["supervised"], engine, summed_loss, hooks.penalty)
        norm = _gradient_norm(parameters, max_grad_norm, engine)
        finite, scaled = math.isfinite(loss) and math.isfinite(norm), _scaled(optimizer)
        if finite or scaled:
            optimizer.step()
        if finite:
            hooks.before_zero_grad(progress.step + 1)
        in_a_row = 0 if finite else in_a_row + 1
        if not finite:
            progress.skipped += 1
            scaling = scaled and math.isfinite(loss)  # a scaler tries smaller and smaller scales by itself
            if in_a_row >= (40 if scaling else 10) or not (skip_nonfinite or scaling):
                raise NonFinite(f"loss {loss}, gradient norm {norm} at step {progress.step + 1}")
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.examples += counts["rows"]
        progress.tokens += counts["tokens"]
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        rows, tokens, padding = counts["rows"], counts["tokens"], 1 - counts["tokens"] / max(counts["places"], 1)
        hooks.after_step(StepReport(progress.step, loss, norm, learning_rate, rows, tokens, seconds, padding, waited))
        if hooks.stop():
            return


def _count(batches: list[Any], engine: Engine) -> dict[str, int]:
    """Supervised tokens, rows, tokens without and with padding of an optimizer step, over all ranks."""
    names = ("supervised", "rows", "tokens", "places")
    own = [sum(getattr(batch, name) for batch in batches) for name in names]
    total = engine.reduce(torch.tensor(own, device=engine.device), "sum").tolist()
    return dict(zip(names, total, strict=True))


def _forward_backward(
    model: Any,
    batches: list[Any],
    supervised: int,
    engine: Engine,
    summed_loss: Callable[[Any, Any], torch.Tensor],
    penalty: Callable[[], torch.Tensor | None],
) -> float:
    """Accumulate the gradient of the mean loss; returns that loss over all ranks."""
    total = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last else engine.no_sync(model):
            with engine.autocast():
                loss = summed_loss(model, batch.to(engine.device)) / supervised
            total += loss.detach()
            extra = penalty() if last else None
            # gradients are averaged over the ranks, so a share of the sum is scaled up by their number
            engine.backward(loss * engine.num_processes + (extra if extra is not None else 0.0))
    return float(engine.reduce(total, "sum"))


def _gradient_norm(parameters: list[torch.Tensor], max_norm: float | None, engine: Engine) -> float:
    """L2 norm of all gradients, which are scaled down to `max_norm` where it is exceeded."""
    norm = engine.clip_grad_norm_(parameters, max_norm if max_norm is not None else math.inf)
    return float(norm)


def _scaled(optimizer: Any) -> bool:
    """True under fp16: the gradient scaler leaves out steps with infinite gradients by itself, and lowers its scale."""
    return getattr(optimizer, "scaler", None) is not None
