"""The learning rate, a function of the step alone."""

from __future__ import annotations

import math

import torch

from vlmtune.config.schema import TrainerConfig


class Schedule:
    """Sets the learning rate of each step: linear warmup, then the chosen shape, a decay down to 0 at `total_steps`.

    Its only state is the number of completed steps, and the length of the warmup if the run has got longer since its
    start.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trainer: TrainerConfig, total_steps: int):
        self.optimizer, self.name, self.total_steps = optimizer, trainer.scheduler.name, total_steps
        self.warmup_fraction = trainer.scheduler.warmup_fraction
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.resume(0, total_steps)

    def factor(self, done: int) -> float:
        """The factor on the peak learning rates in the step after `done` completed steps."""
        if done < self.warmup_steps:
            return done / self.warmup_steps
        if self.name == "constant":
            return 1.0
        left, all_left = self.total_steps - done, max(1, self.total_steps - self.warmup_steps)
        if self.name == "linear":
            return max(0.0, left / all_left)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((done - self.warmup_steps) / all_left))))

    def resume(self, done: int, first_total: int) -> None:
        """Go on after `done` completed steps. `first_total`: steps in all when the run started: its warmup is a
        fraction of these, and stays as it was if the run gets longer.
        """
        self.warmup_steps = round(self.warmup_fraction * first_total)
        self.go_to(done)

    def go_to(self, done: int) -> None:
        """Set the learning rates for the step after `done` completed steps."""
        self.done, factor = done, self.factor(done)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def step(self) -> None:
        """Set the learning rates for the next step."""
        self.go_to(self.done + 1)

    def get_last_lr(self) -> list[float]:
        """The current learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]
