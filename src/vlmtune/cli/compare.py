"""Compare finished runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune.cli.ending import say
from vlmtune.commands import typed
from vlmtune.config import compose
from vlmtune.config.schema import number
from vlmtune.config.strict import read
from vlmtune.errors import ConfigError, nearest
from vlmtune.launch.world import World

OURS = '<meta name="generator" content="vlmtune compare">'
"""In every page that this command wrote."""


@dataclass
class Options:
    """The command's own keys; conf/compare.yaml says what they mean."""

    runs: list[str] = field(default_factory=list)
    metric: str | None = None
    confidence: float = number(0.95, least=0.5, most=0.999)
    seed: int = number(0, least=0)
    output: str | None = None


def check(overrides: list[str], multirun: bool, world: World) -> None:
    """Raise VlmtuneError with every problem that can be found without opening a run."""
    parsed = compose.parse(overrides)
    known = {spec.name for spec in fields(Options)}
    strange = [o for o in parsed if o.key_or_group not in known and not o.key_or_group.startswith("hydra")]
    problems = [f"{o.key_or_group}: no such key; {nearest(o.key_or_group, known)}" for o in strange]
    usable, _ = compose.normalise([str(override.input_line) for override in parsed if override not in strange])
    try:
        options = _options(compose.compose("compare", usable, multirun=multirun))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if not options.runs:
        problems.append(f"no folder is named; for instance {typed('compare')} outputs/sweeps/NAME/STAMP")
    if options.output and (problem := _unfit(Path(options.output).expanduser())):
        problems.append(f"output={options.output}: {problem}")
    if problems:
        raise ConfigError(problems)


def job(composed: Any, world: World) -> int:
    """Print the table and write the page; returns the exit code."""
    from vlmtune import comparison

    options = _options(composed)
    folders = [Path(name).expanduser() for name in options.runs]
    found = comparison.compare(folders, metric=options.metric, confidence=options.confidence, seed=options.seed)
    own = len(folders) == 1 and not (folders[0] / "config.yaml").exists()  # a sweep's page lies beside its trials
    target = Path(options.output).expanduser() if options.output else (folders[0] if own else Path()) / comparison.PAGE
    if problem := _unfit(target):
        raise ConfigError(f"{target}: {problem}")
    say(comparison.table(found))
    say(f"  page         {comparison.write(target, found)}")
    return 0


def _options(composed: Any) -> Options:
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    options: Options = read(Options, {key: value for key, value in raw.items() if key != "hydra"})
    return options


def _unfit(target: Path) -> str | None:
    """Why the page can't be written there."""
    if target.suffix != ".html":
        return f"must end in .html, for instance {target.name}.html"
    if not target.parent.is_dir():
        return f"the folder {target.parent} does not exist"
    if target.exists() and OURS not in target.read_text(encoding="utf-8", errors="replace"):
        return "is not an earlier page of comparisons; name another file"
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        return "can't be written; name another file"
    return None
