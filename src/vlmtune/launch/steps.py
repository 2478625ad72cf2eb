"""The size of an optimizer step: what a run has, whatever the number of processes that it starts or resumes on."""

from __future__ import annotations

from vlmtune.config.schema import Config, TrainerConfig


def step_size(trainer: TrainerConfig, processes: int) -> int:
    """Rows per optimizer step over all processes; with `trainer.batch_tokens`, forward passes."""
    passes = trainer.gradient_accumulation_steps * processes
    if trainer.batch_tokens:
        return trainer.passes_per_step or passes
    return trainer.rows_per_step or trainer.batch_size * passes


def fix(config: Config, processes: int) -> None:
    """Write down the step size of a run that first starts on so many processes; of a range of workers, where chance
    decides how many start, that of the most.
    """
    trainer, workers = config.trainer, config.backend.num_workers
    processes = workers[-1] if isinstance(workers, list) else processes
    key = "passes_per_step" if trainer.batch_tokens else "rows_per_step"
    setattr(trainer, key, step_size(trainer, processes))


def keep(trainer: TrainerConfig, before: TrainerConfig) -> None:
    """Take over the step size of an earlier start of the run, where the command leaves it open."""
    trainer.rows_per_step = trainer.rows_per_step or before.rows_per_step
    trainer.passes_per_step = trainer.passes_per_step or before.passes_per_step
