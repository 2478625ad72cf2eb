"""The learning rate of each step, and that it depends on the step alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

import tiny
from vlmtune.config.schema import SchedulerConfig
from vlmtune.training.schedule import Schedule


def schedule(name: str, warmup: float, *, peak: float, steps: int) -> Schedule:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    return Schedule(optimizer, tiny.config(None, scheduler=SchedulerConfig(name, warmup)).trainer, steps)


@pytest.mark.parametrize(
    ("name", "warmup", "wanted"),
    [
        ("constant", 0.2, [0.0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.2, [0.0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", 0.2, [0.0, 0.5, *((1 + math.cos(math.pi * n / 8)) / 2 for n in range(8))]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]),
    ],
)
def test_the_learning_rate_of_each_step(name: str, warmup: float, wanted: list[float]) -> None:
    made = schedule(name, warmup, peak=2.0, steps=10)
    found = []
    for _ in range(10):
        found += made.get_last_lr()
        made.step()
    assert found == pytest.approx([2.0 * share for share in wanted])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.3, 10), (0.03, 470), (0.0, 7), (1.0, 5)])
def test_each_learning_rate_is_that_of_transformers_to_the_bit(name: str, warmup: float, steps: int) -> None:
    made = schedule(name, warmup, peak=3e-3, steps=steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3e-3)
    theirs = "constant_with_warmup" if name == "constant" else name
    wanted = get_scheduler(theirs, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    for _ in range(steps + 2):
        assert made.get_last_lr() == wanted.get_last_lr()
        made.step()
        optimizer.step()
        wanted.step()


def test_the_warmup_keeps_its_length_if_the_run_gets_longer() -> None:
    made = schedule("constant", 0.5, peak=1.0, steps=20)
    made.resume(3, 8)
    assert made.get_last_lr() == [0.75]
    made.step()
    assert made.get_last_lr() == [1.0]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_learning_rate_of_a_step_does_not_depend_on_how_it_was_reached(name: str) -> None:
    straight = schedule(name, 0.3, peak=0.3, steps=10)
    for step in range(10):
        resumed = schedule(name, 0.3, peak=0.3, steps=10)
        resumed.go_to(step)
        assert resumed.get_last_lr() == straight.get_last_lr()
        straight.step()
