"""sweep.json: what was asked of a sweep, and the overrides of each of its trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.errors import CheckpointError

FILE = "sweep.json"


def exists(sweep: Path) -> bool:
    return (sweep / FILE).is_file()


def read(sweep: Path) -> dict[str, Any]:
    """What the file holds. Raises CheckpointError where there is none, or it can't be read."""
    path = sweep / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"overrides", "trials"} <= found.keys():
            raise ValueError("it has no trials")
        for trial in found["trials"]:
            int(trial["number"]), list(trial["overrides"]), list(trial["swept"])
    except FileNotFoundError:
        nearby = sorted(each.parent.name for each in sweep.parent.glob(f"*/{FILE}"))
        others = f"; sweeps in {sweep.parent}: {', '.join(nearby[-5:])}" if nearby else ""
        raise CheckpointError(f"{sweep}: is not a sweep (it has no {FILE}){others}") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path}: is damaged: {error!r}; delete it, or put the right one back") from error
    return found
