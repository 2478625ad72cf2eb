"""Merge the adapters of finished runs into their base model."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf

from vlmtune.cli.ending import say
from vlmtune.cli.words import overrides_given
from vlmtune.config import compose
from vlmtune.config.schema import Config
from vlmtune.config.strict import read
from vlmtune.errors import ConfigError
from vlmtune.export.options import Options, problems_of
from vlmtune.launch.world import World

OWN = {spec.name for spec in dataclasses.fields(Options)}


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    from vlmtune.export.sources import read_all

    if multirun:
        raise ConfigError("-m: merge writes one folder; try several methods with methods=[linear,ties]")
    usable, problems = compose.normalise(overrides)
    if problems:
        raise ConfigError(problems)
    options = _options(compose.compose("merge", usable))
    found = problems_of(options, has_data=compose.names(overrides, "data.test"))
    if found:
        raise ConfigError(found)
    read_all(options)
    _config(options, overrides)


def job(composed: Any, world: World) -> int:
    """Write the merged model and print what it is; returns the exit code."""
    from vlmtune.export import merge, scoring

    options, overrides = _options(composed), overrides_given("merge")
    scored = compose.names(overrides, "data.test")
    merged = merge.merge(options, _config(options, overrides), scored=scored, command=overrides)
    if merged.scores:
        say(scoring.table(f"{merged.rows} test rows", merged.scores))
    say(f"wrote {options.output}: {merged.difference.sentence}")
    if merged.address is not None:
        say(f"uploaded it to {merged.address}")
    return 0


def _options(composed: Any) -> Options:
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    options: Options = read(Options, {key: value for key, value in raw.items() if key in OWN})
    return options


def _config(options: Options, overrides: list[str]) -> Config:
    """The config of the first run, with the keys of `overrides` that are a run's."""
    own = [o.input_line for o in compose.parse(overrides) if o.key_or_group.split(".")[0] not in {*OWN, "hydra"}]
    return compose.overlay(OmegaConf.create({"run": options.folders[0]}), own)
