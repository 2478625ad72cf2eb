"""metrics.jsonl: one object per logged step, whatever the tracker."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.errors import naming

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one JSON object per call, on disk when the call returns; NaN and infinities are null."""

    def __init__(self, path: Path, resume_step: int | None = None):
        """Start an empty file, or continue one from a checkpoint: lines after `resume_step` are cut."""
        self.path = path
        last = -1 if resume_step is None else resume_step
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= last]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)

    def log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order, none if there is no file; a half-written last line is ignored.

    Lines that are no object with a step are left out, with a warning.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows, strange = [], []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            strange.append(number)
    if strange:
        log.warning("%s: left out %d lines that can't be read, the first is line %d", path, len(strange), strange[0])
    return rows
