"""One trial of a sweep, as the command that starts it knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmtune.config import trial_names

ENDED = ("completed", "failed", "interrupted")


@dataclass
class Trial:
    """A run of the sweep."""

    number: int
    overrides: list[str]
    """All overrides of the run."""
    swept: list[str]
    """Those whose values differ between the trials."""
    folder: Path
    state: str = "waiting"
    """waiting, running, completed, failed or interrupted."""
    began: float | None = None
    ended: float | None = None
    """Both in seconds as `time.monotonic` counts them; None where an earlier command ran the trial."""

    @property
    def label(self) -> str:
        """What differs, short: `r=8 lr=2e-4`."""
        return trial_names.trial_name(self.swept)

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    @property
    def seconds(self) -> float | None:
        """How long it took in all; None where that is not known."""
        return None if self.began is None or self.ended is None else self.ended - self.began
