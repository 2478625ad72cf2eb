"""TF32: faster float32 products and convolutions on a GPU, which read 10 bits of each factor's 23.

Positions stay exact: transformers multiplies them element by element since 5.20 (before, its issue 48428).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def use(on: bool) -> None:
    """Compute with or without it. Torch refuses to read its older switches where they differ from its newer ones, so
    both are set.
    """
    import torch

    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    for switch in _switches():
        switch.fp32_precision = "tf32" if on else "ieee"


@contextmanager
def kept() -> Iterator[None]:
    """While inside, TF32 is off until `use`; afterwards it is as the caller had it, or as torch has it at first."""
    before = _settings() if "torch" in sys.modules else None
    if before is not None:
        use(False)
    try:
        yield
    finally:
        if "torch" in sys.modules:
            _restore(before or ("highest", True, ["none", "none", "tf32", "tf32"]))


Settings = tuple[str, bool, list[str]]
"""Of torch's older switches for products and for convolutions, and of its newer ones."""


def _switches() -> list[Any]:
    """Torch's newer switches, those of the CPU too, which the older one sets as well; none before torch 2.9."""
    import torch

    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    return [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]


def _settings() -> Settings:
    import torch

    newer = [switch.fp32_precision for switch in _switches()]
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, newer
    except RuntimeError:  # the caller set the newer ones alone
        return "highest", True, newer


def _restore(before: Settings) -> None:
    import torch

    products, convolutions, newer = before
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    for switch, value in zip(_switches(), newer, strict=False):
        switch.fp32_precision = value
