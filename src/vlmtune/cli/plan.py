"""Compute the memory of a run, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmtune.cli.ending import say
from vlmtune.cli.words import overrides_given
from vlmtune.config import compose
from vlmtune.config.schema import Config, number
from vlmtune.config.strict import read, strict
from vlmtune.errors import ConfigError
from vlmtune.launch.world import World


@dataclass
class Options:
    """The keys under `plan`; conf/plan.yaml says what they mean."""

    image_tokens: int | None = number(None, least=1)
    text_tokens: int = number(60, least=2)
    answer_tokens: int = number(20, least=1)


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    usable, problems = compose.normalise(overrides)
    if multirun:
        problems.append("-m: a plan is for one run")
    problems += [f"{word.lstrip('+')}: a plan is for one run" for word in usable if compose.asks_for_several(word)]
    try:
        _read(compose.compose("plan", [compose.one_choice(word) for word in usable]), usable)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)


def job(composed: Any, world: World) -> int:
    """Print the plan; returns the exit code."""
    from vlmtune import planning

    given = overrides_given("plan")
    options, config = _read(composed, given)
    own = [word.lstrip("+") for word in given if not word.lstrip("+").startswith(("plan.", "hydra."))]
    row = planning.Row(options.image_tokens, options.text_tokens, options.answer_tokens)
    say(planning.answer(config, row, own, reads_data=compose.names(own, "data")))
    return 0


def _read(composed: DictConfig, overrides: list[str]) -> tuple[Options, Config]:
    """The command's own keys, and the config of the run. Raises ConfigError with the problems of both."""
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    problems: list[str] = []
    options, config = Options(), Config()
    try:
        options = read(Options, raw["plan"], "plan.")
        if options.answer_tokens >= options.text_tokens:
            problems.append(f"plan.answer_tokens={options.answer_tokens}: must be below plan.text_tokens")
    except ConfigError as error:
        problems += error.problems
    try:
        run = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "plan"])
        config = strict(compose.of_run(run, overrides))
        if config.resume:
            problems.append("resume: a plan is for a new run; leave it out")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return options, config
