"""The trials of a sweep that a launcher starts elsewhere: how they ended gets back to the command that started them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmtune.errors import TrainingError


def place() -> tuple[str, int]:
    """This process among all of a cluster: a launcher's trials have places of their own."""
    return platform.node(), os.getpid()


def check(code: int, folder: Path) -> None:
    """Raise TrainingError if the trial in `folder` ended with another exit code than 0: the launcher sends an error
    back, but nothing else.
    """
    from vlmtune.record.runfolder import read_result

    if code:
        result = read_result(folder) or {"status": "failed", "error": None}
        reason = (result["error"] or {}).get("message") or f"exit code {code}"
        way = f"; resume={folder} goes on with it" if result["status"] == "interrupted" else ""
        raise TrainingError(f"{folder}: {result['status']}: {reason}{way}")


@contextmanager
def of_submitit() -> Iterator[None]:
    """Turn submitit's errors into ours: a job that could not be submitted, or one that was killed."""
    try:
        yield
    except RuntimeError as error:
        if "submitit" not in sys.modules:
            raise
        from submitit.core import utils

        if not isinstance(error, utils.UncompletedJobError | utils.FailedSubmissionError):
            raise
        raise TrainingError(f"submitit: {error}") from error
