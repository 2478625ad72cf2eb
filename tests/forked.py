"""Processes forked from one that has imported what a run needs and computed nothing, which saves the imports' seconds:
ten of them for a process that trains.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  what a run needs is imported before anything is forked
import peft  # noqa: F401
import pydantic.type_adapter  # noqa: F401
import pytest
from torch.distributed import TCPStore
from transformers import (  # noqa: F401
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

import vlmtune.run  # noqa: F401
from vlmtune.config import compose  # noqa: F401
from vlmtune.data import table  # noqa: F401


@functools.cache
def context() -> Any:
    """In place of `multiprocessing`: its processes are forked from one that has imported this module, and is ready."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server itself is not told of sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        first = found.Process(target=int)
        first.start()
    first.join()
    return found


def write_to(log: Path) -> None:
    """Send what this process prints to the end of a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def as_ranks(count: int, log: Path, work: Callable[..., None], *given: Any) -> None:
    """Call `work(*given)` on so many ranks, as torchrun would, and wait for them. What they print goes to `log`."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    own = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    ranks = [context().Process(target=_rank, args=(place, log, work, given)) for place in own]
    try:
        for rank in ranks:
            rank.start()
        running = {rank.sentinel: rank for rank in ranks}
        while running:
            for sentinel in connection.wait(running):
                rank = running.pop(sentinel)
                rank.join()
                assert rank.exitcode == 0, log.read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def _rank(place: Mapping[str, Any], log: Path, work: Callable[..., None], given: Sequence[Any]) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    write_to(log)
    work(*given)


gc.freeze()  # nothing of all this is looked at again by each fork, and so copied
