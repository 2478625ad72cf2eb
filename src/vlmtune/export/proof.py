"""Whether a written model is the same function as its base model with the adapter, on a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.layout import padded
from vlmtune.data.records import Record
from vlmtune.errors import CheckpointError
from vlmtune.objectives.next_token import supervised_logits
from vlmtune.prompt.encode import Encoder

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far the logits may be apart, as a share of their size (L2 norms over all compared ones). In 16 bits the merged
weights are rounded, and so is what each layer computes.
"""


@dataclass(frozen=True)
class Difference:
    """How far a merged model is from base and adapter."""

    merged: float
    """||merged - adapted|| / ||adapted|| of the logits."""
    learned: float
    """||adapted - base|| / ||adapted||: what the adapter changes."""
    same: int
    """Answer tokens for which both find the same one most likely."""
    tokens: int
    tolerance: float
    rows: str
    """How many rows, and which."""

    @property
    def sentence(self) -> str:
        return (
            f"logits differ by {self.merged:.2g} of their size (at most {self.tolerance:g}; the adapter changes them "
            f"by {self.learned:.2g}), the most likely token is the same for {self.same} of {self.tokens}: {self.rows}"
        )


def logits_of(model: Any, encoder: Encoder, records: Sequence[Record]) -> list[Tensor]:
    """Logits [N, V] in front of each record's answer, in float32 on the CPU, one record at a time."""
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for record in records:
            batch = padded(encoder, [record]).to(device)
            found.append(supervised_logits(_typed(model, batch), batch)[0].float().cpu())
    return found


def _typed(model: Any, batch: Any) -> Any:
    """`model`, after the images of `batch` are put into the type of its weights, as there is no autocast here."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, value in batch.inputs.items():
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            batch.inputs[name] = value.to(dtype)
    return model


def difference(
    merged: list[Tensor], adapted: list[Tensor], base: list[Tensor], dtype: torch.dtype, rows: str
) -> Difference:
    """Compare logits of the same rows. Raises CheckpointError where the merged model's are too far away."""
    new, old, plain = (torch.cat(each) for each in (merged, adapted, base))
    size = old.norm().clamp(min=1e-12)
    found = Difference(
        merged=float((new - old).norm() / size),
        learned=float((old - plain).norm() / size),
        same=int((new.argmax(-1) == old.argmax(-1)).sum()),
        tokens=len(old),
        tolerance=TOLERANCE[dtype],
        rows=f"{len(merged)} {rows}",
    )
    if not found.merged <= found.tolerance:
        raise CheckpointError(f"the merged model is not the same: {found.sentence}; try dtype=fp32")
    return found
