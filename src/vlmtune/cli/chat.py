"""Talk to finished runs on a page of this machine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune.cli.ending import say
from vlmtune.cli.words import overrides_given
from vlmtune.commands import typed
from vlmtune.config import compose
from vlmtune.config.schema import Config, number, one_of
from vlmtune.config.strict import read
from vlmtune.errors import ConfigError
from vlmtune.launch.world import World

MOST_RUNS = 4


@dataclass
class Options:
    """The command's own keys; conf/chat.yaml says what they mean."""

    run: str | None = None
    runs: list[str] = field(default_factory=list)
    base: str = one_of("auto", "on", "off")
    port: int = number(0, least=0, most=65535)
    open: bool = False


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening a model."""
    if multirun:
        raise ConfigError(f"-m: a page shows several runs at once: {typed('chat')} runs=[A,B]")
    usable, problems = compose.normalise(overrides)
    try:
        _read(compose.compose("chat", usable), overrides)
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys([*problems, *error.problems]))) from error
    if problems:
        raise ConfigError(problems)


def job(composed: Any, world: World) -> int:
    """Open the models and serve the page until Ctrl-C; returns the exit code."""
    options, configs = _read(composed, overrides_given("chat"))
    from vlmtune import display
    from vlmtune.launch import signals, surroundings
    from vlmtune.memory import TRAINING, memory_advice
    from vlmtune.serve import Server, open_sides, serving

    folders = [Path(name).expanduser() for name in _runs(options)]
    saves = configs[0].saves_memory.union(TRAINING)
    with display.logging_to(None), surroundings.kept(), memory_advice(saves), signals.ending_at_once():
        server = Server(open_sides(folders, configs, options.base), options.port)
        serving(server, lambda: _announce(server.address, options.open))
    return 0


def _announce(address: str, opens: bool) -> None:
    import webbrowser

    say(f"  page         {address}\n  Ctrl-C ends it")
    if opens and not webbrowser.open(address):
        say("  open=true: there is no browser to open; use the address above")


def _runs(options: Options) -> list[str]:
    return [*([] if options.run is None else [options.run]), *options.runs]


def _read(composed: Any, overrides: list[str]) -> tuple[Options, list[Config]]:
    """The command's own keys, and the config of each run with the other keys applied. Raises VlmtuneError."""
    own = {spec.name for spec in fields(Options)}
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    options: Options = read(Options, {key: value for key, value in raw.items() if key in own})
    runs = _runs(options)
    if not runs or len(runs) > MOST_RUNS:
        what = "no run is named" if not runs else f"{len(runs)} runs are more than a page shows, {MOST_RUNS}"
        raise ConfigError(f"{what}; for instance {typed('chat')} run=outputs/runs/STAMP, or runs=[A,B]")
    rest = [str(o.input_line) for o in compose.parse(overrides) if o.key_or_group not in own]
    configs = [compose.overlay(OmegaConf.create({"run": name}), rest) for name in runs]
    precisions = sorted({config.trainer.precision for config in configs})
    if len(precisions) > 1:
        raise ConfigError(
            f"the runs compute in {' and '.join(precisions)}, which one process can't; set one, for instance "
            f"trainer.precision={precisions[0]}"
        )
    return options, configs
