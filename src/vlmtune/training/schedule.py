"""The learning rate, a function of the step alone."""

from __future__ import annotations

import math

import torch

from vlmtune.config.schema import TrainerConfig


class Schedule:
    """Sets the learning rate of each step: linear warmup, then the chosen shape down to 0 at `total_steps`.

    Its only state is the number of completed steps, so a resumed run needs only that number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trainer: TrainerConfig, total_steps: int):
        self.optimizer, self.name, self.total_steps = optimizer, trainer.scheduler.name, total_steps
        self.warmup_steps = round(trainer.scheduler.warmup_fraction * total_steps)
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.go_to(0)

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
