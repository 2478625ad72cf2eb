"""The models of the page: finished runs, and what they were before training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config.schema import Config
from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError, ModelError
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.models import load, merging
from vlmtune.predict.predictor import answering
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import limits_of

log = logging.getLogger("vlmtune")
TOLERANCE = 0.01
"""How far apart the logits of one model may be, as a share of the largest: rounding on a GPU differs between passes."""


@dataclass(frozen=True)
class Side:
    """One model that answers on the page. Sides may share a model in memory, so that only one may answer at a time."""

    name: str
    model: Any
    encoder: Encoder
    engine: Engine
    config: Config
    is_untrained: bool = False
    """Whether it is the model before a run's training."""
    without_adapter: bool = False

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the context, the model computes as this side."""
        with self.model.disable_adapter() if self.without_adapter else nullcontext(), self.engine.autocast():
            yield

    @property
    def positions(self) -> int | None:
        """The most tokens of a conversation; None if the model sets no limit."""
        return limits_of(self.model).positions

    @property
    def refuses_turns(self) -> str | None:
        """Why the model's chat template can't show it earlier questions; None if it can."""
        two = Record((Turn("one", ("two",)), Turn("three")), (Image.new("RGB", (64, 64)),))
        try:
            self.encoder.check(two)
        except (DataError, ModelError) as error:
            return str(error).removeprefix(f"{two.place}: ")
        return None


def open_sides(folders: Sequence[Path], configs: Sequence[Config], base: str) -> list[Side]:
    """The models that runs left in `folders`, each with its base model beside it as `base` says: auto, on or off.

    Raises CheckpointError where a run saved no model, ModelError where its base can't be opened.
    """
    names = _names(folders)
    sides = []
    for folder, config, name in zip(folders, configs, names, strict=True):
        wanted = base == "on" or (base == "auto" and len(folders) == 1 and config.uses_adapter)
        sides += _of_run(folder, config, name, wanted)
        if base == "auto" and len(folders) == 1 and not config.uses_adapter:
            log.info("all weights were trained: base=on opens the model before training too, in as much memory again")
    return sides


def _of_run(folder: Path, config: Config, name: str, with_base: bool) -> list[Side]:
    """A run's side, after that of its base if it is wanted and can be had."""
    engine = session.engine(config, trains=False)
    types = answering(session.dtypes(config, engine), config)
    before: list[torch.Tensor] = []

    def note(model: Any, processor: Any) -> None:
        if with_base and config.uses_adapter:
            before.append(_logits(Side("", model, Encoder.of(processor, config), engine, config)))

    model, processor = load.load_trained(folder, config, device=engine.device, on_base=note, **types)
    encoder = Encoder.of(processor, config)
    side = Side(name, model, encoder, engine, config)
    beside = f"{name}, before training"
    if before:
        base = dataclasses.replace(side, name=beside, is_untrained=True, without_adapter=True)
        if _is_same(before[0], _logits(base)):
            return [base, side]
        log.warning("%s: shown without its base model: this adapter changes the base model's own weights", folder)
    elif with_base:
        untrained, own = load.load_base(folder, config, device=engine.device, **types)
        return [Side(beside, untrained.eval(), Encoder.of(own, config), engine, config, is_untrained=True), side]
    return [dataclasses.replace(side, model=merging.merged(model, config))]


@torch.no_grad()
def _logits(side: Side) -> torch.Tensor:
    """Logits [V] after a question about a picture of noise."""
    noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    record = Record((Turn("What is shown?"),), (Image.fromarray(noise),))
    batch = padded(side.encoder, [record], answered=False, side="left").to(side.engine.device)
    side.model.eval()
    with side.at_work():
        logits: torch.Tensor = side.model(**model_inputs(side.model, batch)).logits
    return logits[0, -1].float()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last parts, as many as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len({*names}) == len(names):
            return names
    return [f"{'/'.join(own[-1:])} ({number})" for number, own in enumerate(parts, 1)]
