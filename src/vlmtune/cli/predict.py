"""Answer the rows of a table with a finished run."""

from __future__ import annotations

from typing import Any

from vlmtune.cli.ending import say
from vlmtune.cli.words import overrides_given
from vlmtune.config import compose
from vlmtune.launch.world import World


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    compose.overlay(compose.compose("predict", compose.normalise(overrides)[0], multirun=multirun), overrides)


def job(composed: Any, world: World) -> int:
    """Write the answers and print where they are; returns the exit code."""
    from vlmtune.predict.files import predict_file

    config = compose.overlay(composed, overrides_given("predict"))
    failed = predict_file(composed.run, config, composed.output)
    say(f"wrote {composed.output}" + (f"; {failed} rows failed, see its column `error`" if failed else ""))
    return 0
