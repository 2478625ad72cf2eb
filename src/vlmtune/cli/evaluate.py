"""Score a finished run on rows with answers."""

from __future__ import annotations

from typing import Any

from vlmtune.cli.ending import say
from vlmtune.cli.words import overrides_given
from vlmtune.config import compose
from vlmtune.launch.world import World


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    compose.overlay(compose.compose("evaluate", compose.normalise(overrides)[0], multirun=multirun), overrides)


def job(composed: Any, world: World) -> int:
    """Print the scores; returns the exit code."""
    from vlmtune.predict.scores import evaluate_run

    config = compose.overlay(composed, overrides_given("evaluate"))
    say(evaluate_run(composed.run, config, composed.output))
    return 0
