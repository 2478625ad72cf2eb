"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.record.samples import IMAGE_SIDE, Sample, thumbnail


class TensorBoard:
    """TensorBoard's event files in `folder`/tensorboard."""

    def __init__(self, config: dict[str, Any], folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self._text("config", config, 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, rows: list[Sample], step: int) -> None:
        import numpy as np

        for number, row in enumerate(rows):
            if row.image:
                pixels = np.asarray(thumbnail(row.image, IMAGE_SIDE))
                self.writer.add_image(f"samples/{number}", pixels, step, dataformats="HWC")
            shown = {name: value for name, value in vars(row).items() if name != "image"}
            self._text(f"samples/{number}", shown, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._text("result", summary, 0)
        self.writer.close()

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        """Add JSON as a block of code: Markdown indents it by four spaces."""
        block = "".join(f"    {line}\n" for line in json.dumps(values, indent=2, default=str).splitlines())
        self.writer.add_text(name, block, step)
