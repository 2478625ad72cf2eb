"""Stands in for the names that the search branch brings."""

from __future__ import annotations

from collections.abc import Sequence


def trial_name(swept: Sequence[str]) -> str:
    """What differs, short."""
    return " ".join(override.rpartition(".")[2] for override in swept)
