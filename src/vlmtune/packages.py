"""bitsandbytes is imported by the runs that use it, and by no other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlmtune.errors import ConfigError

NAME = "bitsandbytes"


def import_bitsandbytes(key: str) -> Any:
    """The package. Raises ConfigError, which names the config's `key` that needs it, if it can't be imported."""
    try:
        import bitsandbytes
    except Exception as error:  # a library that doesn't fit raises whatever its loader does
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"{key}: needs bitsandbytes, which can't be imported: {type(error).__name__}: {lines[0]}. "
            f"pip install --force-reinstall {NAME} may help; a run without quantization, with optimizer=adamw or muon, "
            "does not need it"
        ) from error
    return bitsandbytes


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """While inside, PEFT finds no bitsandbytes, unless this process has imported it already.

    PEFT imports it wherever it is installed, for any adapter: this takes a second, and a package that doesn't fit the
    machine ends the run.
    """
    if NAME in sys.modules:
        yield
        return
    sys.modules[NAME] = None  # type: ignore[assignment]  # Python's own sign for a package that can't be imported
    _forget_answers()
    try:
        yield
    finally:
        sys.modules.pop(NAME, None)
        _forget_answers()  # or PEFT would take it for missing in a later run of this process, which quantizes


def _forget_answers() -> None:
    peft = sys.modules.get("peft.import_utils")
    for question in ("is_bnb_available", "is_bnb_4bit_available"):
        if peft is not None:
            getattr(peft, question).cache_clear()
