"""Memory and speed of training steps are what benchmarks/measured.json says; `make measure` writes it anew."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SLOWER = 1.15
"""Runs on a busy machine are apart by less."""


@pytest.mark.slow
def test_steps_take_the_memory_and_the_time_that_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    wanted = json.loads((BENCHMARKS / "measured.json").read_text(encoding="utf-8"))["cases"]
    found = runpy.run_path(str(BENCHMARKS / "measure.py"))["measure"]()
    assert found.keys() == wanted.keys()
    for case, numbers in found.items():
        assert numbers["peak_bytes"] == pytest.approx(wanted[case]["peak_bytes"], rel=0.02), case
        assert numbers["seconds_over_bare"] < SLOWER * wanted[case]["seconds_over_bare"], case
