"""How far a run has come: what a checkpoint holds beside tensors, and what result.json is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far a run has come; saved in each checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    first_total: int | None = None
    """Optimizer steps in all when the run started: a resumed run may have more."""
    examples: int = 0
    """Rows trained on, over all ranks."""
    tokens: int = 0
    """Tokens computed, padding not counted, over all ranks."""
    seconds: float = 0.0
    """Spent in steps: evaluation, saving and starting not counted."""
    skipped: int = 0
    """Steps left out because the loss or the gradient was not finite."""
    baseline: dict[str, float] = field(default_factory=dict)
    """What the untrained model scored."""
    best: float | None = None
    """Best value so far of the metric that chooses the checkpoint."""
    best_step: int | None = None
    since_best: int = 0
    """Evaluations since then."""
    halvings: int = 0
    """How often micro-batches were halved because they did not fit into memory."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What was changed when it was resumed: step, key, was, now."""
