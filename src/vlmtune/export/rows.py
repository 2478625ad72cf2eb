"""The rows on which a merged model is compared with its base and adapter: the run's own, or drawn ones without them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlmtune.config.schema import Config
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import Records
from vlmtune.errors import VlmtuneError

MOST = 4
"""Rows that are compared."""


@dataclass(frozen=True)
class Rows:
    """Records, and where they come from, in words."""

    records: list[Record]
    source: str
    scored: Records | None = None
    """All rows of `data.test`, where it was given."""


def rows_of(config: Config, *, scored: bool) -> Rows:
    """A few rows of `data.test`, which must be readable if it is to be `scored`; else of the run's validation rows, or
    drawn ones where these can't be read.
    """
    from vlmtune.data import table
    from vlmtune.predict.rows import of_test_rows

    if scored:
        records = table.load(of_test_rows(config.data), config.task, config.trainer.seed, ("test",))["test"].records
        return Rows([*_first(records)], "rows of data.test", records)
    few = dataclasses.replace(config.data, max_eval_rows=MOST, check_images="header", test=None)
    try:
        found = table.load(few, config.task, config.trainer.seed, ("validation",))["validation"].records
        return Rows([*_first(found)], "validation rows of the run")
    except VlmtuneError as error:
        return Rows(drawn(), f"drawn rows, as the run's can't be read ({error.problems[0]})")


def _first(records: Records) -> list[Record]:
    return [records[row] for row in range(min(MOST, len(records)))]


def drawn() -> list[Record]:
    """Noise of different shapes, with questions and answers."""
    sizes = ((224, 224), (320, 200), (180, 300), (256, 256))
    turns = (
        Turn("What is in the picture?", ("red",)),
        Turn("How many are there?", ("three of them",)),
        Turn("Describe the image.", ("A dog on a bench.",)),
        Turn("Is it there?", ("yes",)),
    )
    images = [partial(_noise, *size, seed) for seed, size in enumerate(sizes)]
    return [
        Record((turn,), (image,), group=row, row=row)
        for row, (turn, image) in enumerate(zip(turns, images, strict=True))
    ]


def _noise(width: int, height: int, seed: int) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))
