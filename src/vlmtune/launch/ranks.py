"""One error for all processes of a run: the rank that fails says why, and the first rank writes it down.

The others only see a connection that closes, or a launcher that ends them. Told through the store that the ranks found
each other by (MASTER_ADDR, MASTER_PORT), which torchrun keeps until its last process has ended.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import timedelta
from typing import Any

from vlmtune import errors
from vlmtune.errors import TrainingError, VlmtuneError

log = logging.getLogger("vlmtune")
COUNT, FIRST = "vlmtune/errors", "vlmtune/error"
SECONDS = 5
"""That a rank waits for the store at most."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def several() -> bool:
    """Whether a launcher started more than this process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS), wait_for_workers=False)


def tell(error: Exception) -> None:
    """Leave `error` for the first rank, unless another rank was earlier."""
    problems = error.problems if isinstance(error, VlmtuneError) else [f"{type(error).__name__}: {error}"]
    kind = type(error).__name__ if isinstance(error, VlmtuneError) else "TrainingError"
    told = json.dumps({"kind": kind, "problems": [f"rank {rank()}: {problem}" for problem in problems]})
    try:
        store = _store()
        if store.add(COUNT, 1) == 1:
            store.set(FIRST, told)
    except (
        KeyError,
        RuntimeError,
    ) as failure:  # no store, or its process is gone: this rank's own output has the error
        log.debug("the first rank could not be told: %s", failure)


SILENT = (
    "another process of this run ended and left no reason: it was killed, most often as the machine was out of memory, "
    "or it crashed. Its own output, the launcher's or the system's log may say more"
)


def is_broken_connection(error: BaseException) -> bool:
    """Whether it is what gloo and NCCL say where another process is gone."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))


def told() -> VlmtuneError | None:
    """The error that another rank left, None where there is none."""
    try:
        store = _store()
        if not store.check([COUNT]):
            return None
        found = json.loads(store.get(FIRST))
    except (KeyError, RuntimeError):
        return None
    kind = getattr(errors, found["kind"], TrainingError)
    return kind(found["problems"]) if isinstance(kind, type) and issubclass(kind, VlmtuneError) else None
