"""The loop: every supervised token weighs the same, however a step is cut; nothing frozen moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import tiny
from grids import sampled, thinned
from vlmtune.batching.layout import padded
from vlmtune.batching.loader import Loader
from vlmtune.batching.order import ByTokens, Plan
from vlmtune.errors import ConfigError
from vlmtune.launch import session
from vlmtune.objectives.next_token import summed_loss
from vlmtune.training import loop
from vlmtune.training.schedule import Schedule

CONSTANT = tiny.CONSTANT


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen2_vl")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- token weighting


@pytest.mark.parametrize("share", sampled(["off", "on"], ["on"]))
def test_cutting_a_step_changes_nothing(folder: Path, share: str) -> None:
    """8x1 = 2x4 = 1x8. The mean of micro-batches' means would give short answers a larger weight."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "share_prefix": share}
        # SGD-like: with Adam's usual eps, a gradient of rounding errors alone would take a step of full size
        config = tiny.config(folder, scheduler=CONSTANT, optimizer={"eps": 1e-3}, **trainer)
        runs.append(tiny.assemble(config, tiny.records(24, per_image=3)).fit())
    whole, *cut = runs
    for run in cut:
        assert run.losses == pytest.approx(whole.losses, rel=1e-6)
        assert_equal(run.weights(), whole.weights(), 1e-6)


def loader_of(run: tiny.Run, rank: int, processes: int) -> Loader:
    """The loader of one of several ranks."""
    engine: Any = SimpleNamespace(
        process_index=rank, num_processes=processes, device=torch.device("cpu"), mixed_precision="no"
    )
    own, order = run.loader, copy.copy(run.loader.order)
    if isinstance(order, ByTokens):
        order.processes = processes
    else:
        order.cut = replace(order.cut, processes=processes)
    plan = Plan(order, own.total_steps, own.by_group)
    return Loader(run.encoder, own.records, plan, own.layout, run.config.trainer, engine, run.model)


@pytest.mark.parametrize("size", [{"batch_size": 2, "rows_per_step": 7}, {"batch_tokens": 300, "passes_per_step": 3}])
@pytest.mark.parametrize("share", thinned(["on", "off"], 1))
def test_any_number_of_ranks_takes_the_same_steps(folder: Path, size: dict[str, int], share: str) -> None:
    """The losses of 1, 2 and 5 ranks add up to the same; those with fewer rows run passes without labels."""
    config = tiny.config(folder, max_steps=4, share_prefix=share, **size)
    run = tiny.assemble(config, tiny.records(16, per_image=3))

    def steps(processes: int) -> list[tuple[int, int, Any]]:
        """Rows, supervised tokens and summed loss of each step."""
        ranks = [[*loader_of(run, rank, processes).micro_batches()] for rank in range(processes)]
        found, rows, tokens, loss = [], 0, 0, 0.0
        for batches in zip(*ranks, strict=True):
            rows, tokens = rows + sum(b.rows for b in batches), tokens + sum(b.supervised for b in batches)
            loss += sum(summed_loss(run.model, batch).item() for batch in batches)
            assert len({batch.ends_step for batch in batches}) == 1
            if batches[0].ends_step:
                found.append((rows, tokens, pytest.approx(loss, rel=1e-5)))
                rows, tokens, loss = 0, 0, 0.0
        return found

    alone = steps(1)
    assert len(alone) == 4
    assert steps(2) == alone
    assert steps(5) == alone


def test_one_step_is_the_mean_over_tokens(folder: Path) -> None:
    """Compared with transformers' own loss, weighted by counts of tokens, and torch's own optimizer."""
    rows = tiny.records(6)
    config = tiny.config(folder, batch_size=2, gradient_accumulation_steps=3, max_steps=1, scheduler=CONSTANT)
    run = tiny.assemble(config, rows)
    reference = tiny.assemble(config, rows).model.train()
    run.fit()

    batches = [padded(run.encoder, [row]) for row in rows]
    total = sum(batch.supervised for batch in batches)
    assert len({batch.supervised for batch in batches}) > 3, "answers of different lengths"
    loss = sum(
        reference(input_ids=b.input_ids, attention_mask=b.attention_mask, labels=b.labels, **b.inputs).loss
        * (b.supervised / total)
        for b in batches
    )
    assert run.losses == [pytest.approx(loss.item(), rel=1e-5)]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert run.reports[0].gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0).step()
    close = [
        torch.isclose(p, run.weights()[name], rtol=0, atol=1e-5).float().mean()
        for name, p in reference.named_parameters()
    ]
    assert torch.stack(close).mean() > 0.99, "but for gradients near zero, whose sign decides Adam's first step"


def test_rows_and_tokens_are_counted(folder: Path) -> None:
    rows = tiny.records(10)
    run = tiny.assemble(tiny.config(folder, max_steps=None, epochs=2.0, batch_size=4), rows).fit()
    assert [report.examples for report in run.reports] == [4, 4, 2] * 2
    assert run.progress.examples == 20
    assert run.progress.tokens == 2 * sum(padded(run.encoder, [row]).tokens for row in rows)
    assert [report.step for report in run.reports] == [1, 2, 3, 4, 5, 6]


def test_training_lowers_the_loss(folder: Path) -> None:
    config = tiny.config(folder, max_steps=12, batch_size=6, learning_rate=3e-3)
    losses = tiny.assemble(config, tiny.records(6)).fit().losses
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- gradient norm, learning rate


class Quadratic(torch.nn.Module):
    """A model of one weight per entry whose summed loss on a batch is `scale * weight`."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))


class Numbers:
    """A batch: `count` supervised tokens whose losses sum to `value * weight`."""

    def __init__(self, value: float, count: int = 1, ends_step: bool = True):
        self.value, self.supervised, self.rows, self.tokens, self.padded_tokens = value, count, 1, count, count
        self.ends_step = ends_step

    def to(self, device: torch.device) -> Numbers:
        return self


def scaled_sum(model: Quadratic, batch: Numbers) -> torch.Tensor:
    return batch.value * model.weight.sum()


def fit(steps: list[list[Numbers]], **options: Any) -> tuple[Quadratic, list[loop.StepReport], loop.Progress]:
    config = tiny.config(None, scheduler=CONSTANT)
    trainer, engine = config.trainer, session.engine(config)
    model = Quadratic()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = Schedule(plain, trainer, 100)
    optimizer = AcceleratedOptimizer(plain, scaler=options.pop("scaler", None))
    reports: list[loop.StepReport] = []
    progress = loop.Progress()
    hooks = loop.Hooks(after_step=(reports.append,), **options.pop("hooks", {}))
    batches = [Numbers(b.value, b.supervised, b is step[-1]) for step in steps for b in step]
    loop.fit(model, batches, optimizer, scheduler, engine, scaled_sum, progress, hooks=hooks, **options)
    return model, reports, progress


def test_the_gradient_is_clipped_after_all_micro_batches() -> None:
    steps = [[Numbers(30.0, 1), Numbers(10.0, 3)]]  # mean gradient 40 / 4 in each of 4 entries: norm 20
    model, reports, _ = fit(steps, max_grad_norm=1.0)
    assert reports[0].gradient_norm == pytest.approx(20.0)
    assert model.weight.detach().norm() == pytest.approx(1.0, rel=1e-4)
    model, reports, _ = fit(steps, max_grad_norm=None)
    assert reports[0].gradient_norm == pytest.approx(20.0)
    assert model.weight.tolist() == pytest.approx([-10.0] * 4)


@pytest.mark.parametrize("expected_tokens", [0.01, 3.0, 700.0])
def test_what_a_step_is_expected_to_have_changes_nothing(expected_tokens: float) -> None:
    steps = [[Numbers(30.0, 1), Numbers(10.0, 3), Numbers(2.0, 5)]]
    model, reports, _ = fit(steps, max_grad_norm=None, expected_tokens=expected_tokens)
    assert model.weight.tolist() == pytest.approx([-42.0 / 9] * 4)
    assert reports[0].loss == 0.0
    assert reports[0].tokens == 9


def test_a_penalty_counts_once_per_step() -> None:
    penalty = torch.nn.Parameter(torch.tensor(3.0))
    _, reports, _ = fit([[Numbers(1.0), Numbers(1.0), Numbers(1.0)]], hooks={"penalty": lambda: 2.0 * penalty})
    assert penalty.grad is not None
    assert penalty.grad.item() == 2.0
    assert reports[0].loss == 0.0, "the reported loss is that of the tokens"


def test_a_nonfinite_step_stops_the_run() -> None:
    model_steps = [[Numbers(1.0)], [Numbers(math.nan)], [Numbers(1.0)]]
    with pytest.raises(loop.NonFinite, match="at step 2"):
        fit(model_steps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_step_is_left_out_where_asked(bad: float) -> None:
    model, reports, progress = fit([[Numbers(1.0)], [Numbers(1.0), Numbers(bad)], [Numbers(1.0)]], skip_nonfinite=True)
    assert model.weight.tolist() == [-2.0] * 4
    assert (progress.step, progress.skipped, len(reports)) == (3, 1, 3)


class Scaler:
    """A gradient scaler that only notes that it was asked to step: itself it leaves out what is not finite."""

    steps = 0

    def step(self, *_: Any) -> None:
        self.steps += 1

    def update(self) -> None: ...


def test_under_fp16_the_scaler_sees_every_step() -> None:
    """It must be told of a bad step too, or its next `unscale_` raises; an infinite gradient alone is its business."""
    scaler = Scaler()
    fit([[Numbers(1e38)], [Numbers(1.0)]], scaler=scaler)
    assert scaler.steps == 2
    with pytest.raises(loop.NonFinite):
        fit([[Numbers(math.nan)]], scaler=scaler)
    fit([[Numbers(math.nan)], [Numbers(1.0)]], scaler=scaler, skip_nonfinite=True)
    assert scaler.steps == 5


def test_ten_nonfinite_steps_in_a_row_stop_all_the_same() -> None:
    nine = [[Numbers(math.nan)]] * 9
    assert fit([*nine, [Numbers(1.0)], *nine], skip_nonfinite=True)[2].skipped == 18
    with pytest.raises(loop.NonFinite):
        fit([*nine, [Numbers(math.nan)]], skip_nonfinite=True)


def test_stop_is_asked_after_each_step() -> None:
    asked = iter([False, True])
    _, reports, _ = fit([[Numbers(1.0)]] * 5, hooks={"stop": lambda: next(asked)})
    assert len(reports) == 2


def test_gradients_are_there_before_they_are_cleared() -> None:
    """AdaLoRA ranks its directions by them."""
    seen: list[int] = []
    fit([[Numbers(1.0)]] * 3, hooks={"before_zero_grad": seen.append})
    assert seen == [1, 2, 3]


# ---------------------------------------------------------------- what moves


def moved(run: tiny.Run, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in run.weights().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_fine_tuning_moves_all_but_the_frozen_part(checkpoint_of: Any, family: str) -> None:
    rows = tiny.records(4)
    run = tiny.assemble(tiny.config(checkpoint_of(family), model={"freeze": ["vision"]}, scheduler=CONSTANT), rows)
    before = run.weights()
    changed = moved(run.fit(), before)
    vision = {name for name in before if run.parts.of(name) == "vision"}
    assert vision
    assert not changed & vision
    assert changed == before.keys() - vision


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_moves_itself_alone(checkpoint_of: Any, family: str) -> None:
    run = tiny.assemble(tiny.config(checkpoint_of(family), adapter=tiny.LORA, scheduler=CONSTANT), tiny.records(4))
    before = run.weights()
    changed = moved(run.fit(), before)
    assert changed == {name for name in before if "lora_" in name}
    assert {run.parts.of(name) for name in changed} == {"language"}


def test_a_rate_of_its_own_for_each_part(folder: Path) -> None:
    rates = {"vision": 0.0, "projector": 2e-3}
    config = tiny.config(folder, learning_rate_of=rates, optimizer={"weight_decay": 0.1}, scheduler=CONSTANT)
    run = tiny.assemble(config, tiny.records(4))
    for group in run.optimizer.param_groups:
        assert group["lr"] == rates.get(group["part"], 1e-3)
        assert group["weight_decay"] == (0.1 if group["params"][0].dim() > 1 else 0.0)
    grouped = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in run.model.parameters()), "each weight in exactly one group"
    before = run.weights()
    changed = moved(run.fit(), before)
    assert {run.parts.of(name) for name in before.keys() - changed} == {"vision"}


def test_a_rate_for_a_part_that_does_not_train_is_refused(folder: Path) -> None:
    config = tiny.config(folder, learning_rate_of={"vision": 1e-3}, adapter=tiny.LORA)
    with pytest.raises(ConfigError, match=r"learning_rate_of\.vision: this part has no trainable weight"):
        tiny.assemble(config, tiny.records(4))
    whole = tiny.config(folder, model={"freeze": ["vision", "projector", "language", "head"]})
    with pytest.raises(ConfigError, match=r"model\.freeze: covers the whole model"):
        tiny.assemble(whole, tiny.records(4))


@pytest.mark.parametrize("adapter", [None, tiny.LORA])
def test_gradient_checkpointing_changes_no_gradient(folder: Path, adapter: Any) -> None:
    plain, recomputed = (
        tiny.assemble(
            tiny.config(folder, adapter=adapter, gradient_checkpointing=on, optimizer={"eps": 1e-3}), tiny.records(8)
        ).fit()
        for on in (False, True)
    )
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)
    assert_equal(recomputed.weights(), plain.weights(), 1e-6)


def test_dropout_is_on_in_training_even_after_an_evaluation(folder: Path) -> None:
    def losses(dropout: float) -> list[float]:
        config = tiny.config(folder, adapter={**tiny.LORA, "lora_dropout": dropout}, scheduler=CONSTANT)
        run = tiny.assemble(config, tiny.records(4))
        run.model.eval()  # as every evaluation in between leaves it, at worst
        return run.fit().losses

    with_dropout, without = losses(0.5), losses(0.0)
    assert with_dropout[0] == without[0], "LoRA's B is zero at first"
    assert with_dropout[2] != without[2]
