"""One of two ranks, played alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def first_of_two() -> Iterator[Any]:
    """The engine of a process that is the first of two: what it sends goes nowhere, and it receives nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield SimpleNamespace(device=torch.device("cpu"), num_processes=2, scaler=None)
    finally:
        distributed.destroy_process_group()
