"""The training loop, and what happens between its steps."""

from vlmtune.training.attempts import Attempts
from vlmtune.training.best import Best
from vlmtune.training.finish import Finish
from vlmtune.training.journal import Journal
from vlmtune.training.optim import build_optimizer
from vlmtune.training.saving import Saving
from vlmtune.training.schedule import Schedule
from vlmtune.training.scoring import Scoring
from vlmtune.training.setup import Setup
from vlmtune.training.stopping import Stopping

__all__ = [
    "Attempts",
    "Best",
    "Finish",
    "Journal",
    "Saving",
    "Schedule",
    "Scoring",
    "Setup",
    "Stopping",
    "build_optimizer",
]
