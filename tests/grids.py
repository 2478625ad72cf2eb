"""Large grids: `make test` runs a sample that proves something different each, `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The values as parameters, those outside `quick` marked slow. A value is one argument, or a tuple of them."""
    found = [*values]
    assert {*quick} <= {*found}, "no such values"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in quick else pytest.mark.slow
        )
        for value in found
    ]


def thinned(values: Iterable[Any], keep: int) -> list[Any]:
    """The values as parameters, `keep` of them spread evenly over all, the others marked slow: one proof many times."""
    found = [*values]
    kept = {n * len(found) // keep for n in range(keep)}
    return [value if n in kept else _slow(value) for n, value in enumerate(found)]


def _slow(value: Any) -> Any:
    if hasattr(value, "marks"):  # a pytest.param
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.slow], id=value.id)
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
