"""What a run that has opened its model will need, by the same count as `plan.py`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch

from vlmtune import display
from vlmtune.batching.loader import Loader
from vlmtune.config.schema import Config
from vlmtune.errors import VlmtuneError
from vlmtune.launch.engine import Engine
from vlmtune.models.parts import base_of, count
from vlmtune.planning.estimate import Plan
from vlmtune.planning.rows import on_meta
from vlmtune.planning.skeleton import Machine

log = logging.getLogger("vlmtune")
SMALL = 50_000_000
"""Weights below which a run on a CPU is not predicted: it needs less than its libraries."""
REFUSALS = (VlmtuneError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError)
"""What the count may raise for a model that computes in a way which shapes alone don't tell."""


def predicted(config: Config, model: Any, loader: Loader, candidates: Sequence[int], engine: Engine) -> int:
    """Bytes of tensors at the peak of training; 0 where they are not predicted, which the log then says why.

    On an accelerator all tensors, on a CPU those beside what the process held before it opened the model.
    `candidates`: numbers of training rows, one of which is the longest.
    """
    if engine.device.type == "cpu" and sum(map(count, model.parameters())) < SMALL:
        return 0
    if not candidates:
        log.info("memory     not predicted: the rows of a stream are not known in advance")
        return 0
    try:
        found = _counted(config, model, loader, candidates, engine)
    except REFUSALS as error:
        log.info("memory     not predicted: %.200s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return 0
    log.info("memory     %s predicted for weights, optimizer and the longest row", display.size(found, "B"))
    return found


def _counted(config: Config, model: Any, loader: Loader, candidates: Sequence[int], engine: Engine) -> int:
    lengths = [sum(counts) for counts in loader.encoder.lengths([loader.records[row] for row in candidates])]
    batch = on_meta(loader.around(candidates[lengths.index(max(lengths))]))
    machine = Machine(torch.device(engine.device.type), engine.mixed_precision, engine.num_processes)
    plan = Plan(copy.deepcopy(base_of(model).config), lambda _: lambda rows: batch, machine)
    estimate = plan.of(config)
    return int(estimate.total - estimate.context)
