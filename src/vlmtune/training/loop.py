"""The training loop: torch only, everything else is passed in."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmtune.errors import NonFinite
from vlmtune.launch.engine import Engine
from vlmtune.memory import noted
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
    """How many of these seconds the step waited for data."""


@dataclass
class Hooks:
    """Functions called around steps; each is optional."""

    before_step: Callable[[int], None] = lambda step: None
    """Called with the number of steps done, before the step's first forward pass."""
    after_step: Sequence[Callable[[StepReport], None]] = ()
    """Called in order after each optimizer step: logging, evaluation, checkpoints."""
    before_zero_grad: Callable[[int], None] = lambda step: None
    """Called with the step number, from 1, before the gradients are cleared."""
    penalty: Callable[[], torch.Tensor | None] = lambda: None
    """A term added to the mean loss once per optimizer step."""
    stop: Callable[[], bool] = field(default=lambda: False)
    """Called after each step on every rank; True ends training."""


@dataclass
class Passed:
    """The result of one optimizer step's forward and backward passes, over all ranks."""

    loss: Any
    """Mean over the supervised tokens; a tensor on the device until `_read`."""
    counts: dict[str, Any]
    """By the names in COUNTED; with several ranks tensors on the device until `_read`."""
    waited: float


def fit(
    model: Any,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    engine: Engine,
    summed_loss: Callable[[Any, Any], torch.Tensor],
    progress: Progress,
    *,
    expected_tokens: float = 1.0,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    hooks: Hooks,
) -> None:
    """Train on this rank's micro-batches; `ends_step` marks the last one of each optimizer step. Raises NonFinite.

    Every supervised token has the same weight, however a step is split into micro-batches and ranks: losses are
    summed and divided by the number of supervised tokens over all of them. That number is only known at the step's
    last micro-batch. Until then losses are divided by `expected_tokens`, an estimate of a rank's supervised tokens
    per step, so that gradients stay near their final size.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    patience = Patience(optimizer, skip_nonfinite)
    iterator = iter(batches)
    model.train()  # evaluation between steps restores this mode
    while True:
        began = time.perf_counter()
        hooks.before_step(progress.step)
        passed = _forward_backward(model, iterator, parameters, engine, summed_loss, hooks.penalty, expected_tokens)
        if passed is None:
            return
        passed, norm = _read(passed, _gradient_norm(optimizer, parameters, max_grad_norm, engine))
        learning_rate = scheduler.get_last_lr()[0]
        _update(passed.loss, norm, optimizer, patience, progress, hooks)
        scheduler.step()
        report = _report(passed, progress, norm, learning_rate, time.perf_counter() - began)
        for hook in hooks.after_step:
            hook(report)
        if hooks.stop():
            return


def _read(passed: Passed, norm: torch.Tensor) -> tuple[Passed, float]:
    """Loss, counts and gradient norm as numbers: the only time that a step waits for the device."""
    on_device = {name: value for name, value in passed.counts.items() if isinstance(value, torch.Tensor)}
    tensors = [tensor.to(passed.loss.device).double() for tensor in (passed.loss, norm, *on_device.values())]
    loss, norm_read, *counts = torch.stack(tensors).tolist()
    read = dict(zip(on_device, map(int, counts), strict=True))
    return Passed(loss, {**passed.counts, **read}, passed.waited), norm_read


def _update(loss: float, norm: float, optimizer: Any, patience: Patience, progress: Progress, hooks: Hooks) -> None:
    """Take the step if loss and gradients are finite, and clear the gradients. Raises NonFinite."""
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite or patience.scaled:
        with noted("in the optimizer's step"):
            optimizer.step()
    if finite:
        hooks.before_zero_grad(progress.step + 1)
    patience.note(loss, norm, progress)
    optimizer.zero_grad(set_to_none=True)


def _forward_backward(
    model: Any,
    iterator: Iterator[Any],
    parameters: list[torch.Tensor],
    engine: Engine,
    summed_loss: Callable[[Any, Any], torch.Tensor],
    penalty: Callable[[], torch.Tensor | None],
    expected_tokens: float,
) -> Passed | None:
    """Compute the gradient of one step's mean loss, in `parameters`. Returns None when no micro-batch is left."""
    alone = getattr(model, "module", model)  # without the DDP wrapper, which exchanges at a step's last micro-batch
    own, waited = Counter[str](), 0.0
    total = torch.zeros((), device=engine.device)
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - began
        if batch is None:
            return None
        own.update({name: getattr(batch, name) for name in COUNTED})
        if not batch.ends_step:
            with engine.no_sync(model):
                total += _pass(alone, batch, engine, summed_loss, expected_tokens)
            continue
        counts = _over_ranks(own, engine)
        # DDP averages gradients over the ranks, so the token count is divided by the number of ranks
        share = counts["supervised"] / engine.num_processes
        _scale(parameters, expected_tokens / share)
        total += _pass(model, batch, engine, summed_loss, share, penalty)
        return Passed(engine.reduce(total / counts["supervised"], "sum"), counts, waited)


COUNTED = ("supervised", "rows", "tokens", "padded_tokens")
"""Counted per micro-batch: supervised tokens, rows, tokens without padding, tokens with padding."""


def _over_ranks(own: Counter[str], engine: Engine) -> dict[str, Any]:
    """The counts of all ranks: numbers if this is the only one, else tensors on the device, which are read later."""
    if engine.num_processes == 1:
        return dict(own)
    numbers = torch.tensor([own[name] for name in COUNTED]).to(engine.device, non_blocking=True)
    return dict(zip(COUNTED, engine.reduce(numbers, "sum"), strict=True))


def _pass(
    model: Any,
    batch: Any,
    engine: Engine,
    summed_loss: Callable[[Any, Any], torch.Tensor],
    divisor: float | torch.Tensor,
    penalty: Callable[[], torch.Tensor | None] = lambda: None,
) -> torch.Tensor:
    """Accumulate the gradient of (a micro-batch's summed loss / `divisor` + `penalty`). Returns the summed loss."""
    size = f"{batch.rows} rows, {batch.padded_tokens} tokens"
    with noted(f"in the forward pass of {size}"), engine.autocast():
        loss = summed_loss(model, batch.to(engine.device))
    extra = penalty()
    with noted(f"in the backward pass of {size}"):
        engine.backward(loss / divisor + (extra if extra is not None else 0.0))
    return loss.detach()


def _scale(parameters: list[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Scale the gradients accumulated so far."""
    if isinstance(factor, torch.Tensor):
        factor = factor.to(parameters[0].device)  # where a sharded model may be kept on the CPU
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _gradient_norm(
    optimizer: Any, parameters: list[torch.Tensor], max_norm: float | None, engine: Engine
) -> torch.Tensor:
    """L2 norm of all gradients before clipping, on the device; they are clipped to `max_norm`.

    Where the backward pass has applied them to the weights already (`Tensorwise`), the optimizer knows their norm.
    """
    applied: torch.Tensor | None = getattr(getattr(optimizer, "optimizer", optimizer), "applied_norm", lambda: None)()
    if applied is not None:
        return applied
    norm = engine.clip_grad_norm_(parameters, max_norm if max_norm is not None else math.inf)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
    return whole


class Patience:
    """How many steps in a row may be skipped because loss or gradient is not finite.

    Under fp16 the gradient scaler itself skips steps with infinite gradients and lowers its scale, so `step` is
    called for every step, and more skipped steps in a row are allowed.
    """

    def __init__(self, optimizer: Any, skip: bool):
        self.skip, self.scaled = skip, getattr(optimizer, "scaler", None) is not None
        self.in_a_row = 0

    def note(self, loss: float, norm: float, progress: Progress) -> None:
        """Count a skipped step. Raises NonFinite if the run has to stop."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        scaling = self.scaled and math.isfinite(loss)  # the scaler tries smaller and smaller scales
        if self.in_a_row >= (40 if scaling else 10) or not (self.skip or scaling):
            raise NonFinite(
                f"loss {loss}, gradient norm {norm} at step {progress.step + 1}. A lower trainer.learning_rate, "
                "trainer.precision=fp32 or trainer.max_grad_norm=1 may help; trainer.nonfinite=skip skips such steps"
            )
        progress.skipped += 1


def _report(passed: Passed, progress: Progress, norm: float, learning_rate: float, seconds: float) -> StepReport:
    """Update the progress after a completed step."""
    counts = passed.counts
    progress.step += 1
    progress.examples += counts["rows"]
    progress.tokens += counts["tokens"]
    progress.seconds += seconds
    return StepReport(
        step=progress.step,
        loss=passed.loss,
        gradient_norm=norm,
        learning_rate=learning_rate,
        examples=counts["rows"],
        tokens=counts["tokens"],
        seconds=seconds,
        padding_share=1 - counts["tokens"] / max(counts["padded_tokens"], 1),
        waited=passed.waited,
    )
