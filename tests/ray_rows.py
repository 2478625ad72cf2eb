"""What the workers of tests/test_ray.py import as `data._target_`: the rows of a table, and what is to happen at which
step, from the file plan.json beside it.

Each micro-batch is noted in a file of its own beside the table, with its step, its rank and its rows.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from vlmtune.batching.loader import Loader
from vlmtune.config.schema import DataConfig
from vlmtune.data.table import read_files
from vlmtune.errors import DataError


def load(config: DataConfig) -> Any:
    """The rows. From here on, this process follows the plan."""
    follow(Path(config.train).parent)
    return read_files(config)


def follow(folder: Path) -> None:
    """Note what this process makes, and do what the plan says: "kill" or "fail" the [rank, step]s in it, and "hold"
    each rank of [ranks, step] as long as that is in the plan.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    real = Loader.make

    def planned(what: str) -> Any:
        return json.loads((folder / "plan.json").read_text()).get(what, [])

    start = [time.monotonic(), os.environ["MASTER_PORT"]]  # which the ranks of one start share

    def make(self: Loader, step: int, number: int) -> Any:
        rows = self.order.passes(step, rank)[number : number + 1]
        note = {"step": step, "start": start, "ranks": ranks, "rows": rows[0] if rows else []}
        file = folder / f"made_{rank}_{time.monotonic_ns()}"
        file.write_text(json.dumps(note))
        file.rename(file.with_suffix(".json"))  # there in full
        if [rank, step] in planned("kill") and once(folder / f"killed_{rank}_{step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if [rank, step] in planned("fail"):
            raise DataError(f"rank {rank} can't read a row of step {step}")
        while [ranks, step] in planned("hold"):
            time.sleep(0.1)
        return real(self, step, number)

    Loader.make = make  # type: ignore[method-assign]


def once(mark: Path) -> bool:
    """True for the first caller of all processes."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
