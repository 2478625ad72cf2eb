"""Names of sweeps and trials: they say what differs."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 100
"""Letters of a sweep's name; a file system takes 255 bytes."""


def sweep_name(sweeps_file: str | None, keys: Sequence[str]) -> str:
    """The name of the sweep file, else the swept keys; `trials` where nothing is swept."""
    return (sweeps_file or ",".join(keys) or "trials").replace("/", ".")[:LONGEST]


def trial_name(swept: Sequence[str]) -> str:
    """What differs, short."""
    return " ".join(override.rpartition(".")[2] for override in swept)
