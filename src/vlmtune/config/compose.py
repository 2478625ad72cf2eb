"""From a command line to a `Config`: Hydra composes it, this package checks it."""

from __future__ import annotations

import functools
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vlmtune.commands import PACKAGE, typed
from vlmtune.config import launchers, paths, saved, sweep_file, sweepers
from vlmtune.config.adapter_source import with_source
from vlmtune.config.paths import files_of
from vlmtune.config.schema import AUTO, SCHEMA, Config, defaults, home
from vlmtune.config.strict import strict, unreadable
from vlmtune.errors import CheckpointError, ConfigError, UsageError, nearest

VERSION_BASE = "1.3"
"""The version of Hydra whose behaviour is asked for."""
COMMANDS_OWN = (
    *("run", "output", "runs", "metric", "confidence", "seed", "plan", "base", "port", "open"),
    *("weights", "method", "methods", "density", "majority_sign_method", "dtype", "push_to_hub", "public", "gguf"),
)
"""Keys of commands other than train, which `strict` refuses elsewhere."""
NOT_ONE_RUN = "means several runs; add -m, or quote the value if it is one text"
OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)
OmegaConf.register_new_resolver("home", lambda: str(home()), replace=True)
OmegaConf.register_new_resolver("typed", typed, replace=True)
ConfigStore.instance().store("defaults", defaults())  # where conf/train.yaml starts, so that --help shows them too


@functools.cache
def groups() -> dict[str, list[str]]:
    """The config groups and their options."""
    folders = [*sorted((home() / "conf").iterdir()), home() / "sweeps"]
    found = {f.name: sorted(_options(f)) for f in folders if f.is_dir()}
    return {name: options for name, options in found.items() if name != "hydra"}


def _options(folder: Path) -> list[str]:
    """The files of a config group; sweeps/wandb_*.yaml are for W&B's server."""
    return [
        file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("wandb_") or folder.name != "sweeps"
    ]


def normalise(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides in the form that Hydra needs, and problems that Hydra would miss or report poorly.

    Every key is set with `++`, whether or not a YAML file has it, because `strict` knows which keys exist: `a=1` and
    `+a=1` are the same. Raises UsageError for arguments that are not overrides.
    """
    out, problems = [], []
    for override in parse(overrides):
        text, key = str(override.input_line), override.key_or_group
        plain = text.lstrip("+~")
        if key.startswith("hydra"):
            out.append(text)
        elif override.is_delete():
            problems.append(f"{text}: keys can't be removed; set another value")
        elif key in groups():
            values = list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]
            options = [*groups()[key], *(["null"] if key in ("sweeps", "experiment") else [])]
            wrong = [f"{key}={v}: {nearest(str(v), options)}" for v in values if str(v or "null") not in options]
            problems += wrong
            out += [] if wrong else [plain]
        elif key.split(".")[0] not in SCHEMA and key not in COMMANDS_OWN and not key.startswith("plan."):
            problems.append(f"{key}: no such key; {nearest(key.split('.')[0], SCHEMA)}")
        else:
            out.append("++" + plain)
    return out, problems


def parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's `Override` objects. Raises UsageError that lists all arguments that are not overrides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        text = paths.literal(text, parser)
        try:
            override = parser.parse_override(text)
            if not override.key_or_group:
                raise HydraException("no key")
            parsed.append(override)
        except HydraException:
            key, equals, value = text.partition("=")
            quoting = f"; to quote the value: {paths.shown(key, value)}" if key and equals else ""
            problems.append(f"{text}: is not an override; write key=value{quoting}")
    if problems:
        raise UsageError(problems)
    return parsed


def compose(command: str, overrides: Sequence[str], *, multirun: bool = False) -> DictConfig:
    """Hydra's composition of `conf/<command>.yaml` with normalised overrides. Raises ConfigError.

    It can be asked for inside a Hydra job too, whose own state is put back.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    logger = logging.getLogger("hydra")
    level, outer = logger.level, GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    logger.setLevel(logging.ERROR)
    try:
        with hydra.initialize_config_dir(str(home() / "conf"), version_base=VERSION_BASE):
            composed: DictConfig = hydra.compose(command, list(overrides), return_hydra_config=True)
            launchers.check(composed, multirun)
            sweepers.check(composed, multirun)
            return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_reason(error)) from error
    finally:
        logger.setLevel(level)  # the caller's
        GlobalHydra.instance().hydra = outer


def _reason(error: Exception) -> str:
    """What Hydra refused; for a key that is not there, those that are."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return f"{cause.full_key}: no such key; {nearest(str(cause.key), [str(key) for key in cause.parent_node])}"
    return launchers.not_found(str(error)) or str(error).strip().splitlines()[0]


def read(command: str, overrides: Sequence[str], *, multirun: bool = False) -> tuple[Config, DictConfig]:
    """The checked config of a run, and the Hydra composition that it came from. Raises ConfigError with all problems.

    `multirun`: overrides may have several values; the first one is used here.
    """
    usable, problems = normalise(overrides)
    if not multirun:
        problems += [_several(override.lstrip("+")) for override in usable if asks_for_several(override)]
    try:
        chosen = [one_choice(override) for override in usable]
        composed = compose(command, chosen, multirun=multirun)
        config = strict(of_run(composed, chosen))
        problems += [MOVING_FOLDER] if config.resume == AUTO and not multirun and _moves(composed) else []
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return config, composed


def of_run(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The values of a run: as composed, with the adapter that `adapter.from` names; or those of the run that `resume`
    names, with the overrides applied.
    """
    resumed = composed.get("resume")
    if resumed not in (None, AUTO):
        return saved_config(resumed, overrides)
    return with_source(composed, parse(overrides))


MOVING_FOLDER = "resume=auto: the run needs the same folder at each start; add hydra.run.dir=FOLDER"


def _moves(composed: DictConfig) -> bool:
    """Whether the run folder is another one at each start."""
    folder = OmegaConf.to_container(composed.hydra.run, resolve=False)
    return "${now:" in str(folder)


def _several(override: str) -> str:
    key, _, value = override.partition("=")
    if key in ("data.train", "data.validation", "data.test"):
        again = shlex.quote(f"{key}=[{value}]")
        return f"{override}: to read several files write {again}; to start one run per value add -m"
    return f"{override}: {NOT_ONE_RUN}: {paths.shown(key, value)}"


def asks_for_several(override: str) -> bool:
    """True for `a=1,2` and for `sweeps=NAME`, which mean several runs."""
    [parsed] = parse([override])
    return parsed.is_sweep_override() or (parsed.key_or_group == "sweeps" and parsed.value() is not None)


def one_choice(override: str) -> str:
    """The first value of a sweep, so that one config can be checked before all of them run."""
    [parsed] = parse([override])
    if not parsed.is_sweep_override():
        return override
    value = parsed.value().start if parsed.is_interval_sweep() else next(parsed.sweep_string_iterator())
    return f"{override.split('=', 1)[0]}={value}"


def saved_config(run: str | Path, overrides: Sequence[str]) -> DictConfig:
    """The config of an earlier run with these overrides applied.

    Raises CheckpointError if there is none, ConfigError if it names code that no override confirms.
    """
    path = Path(run).expanduser() / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run}: is not a run folder (it has no config.yaml){_runs_nearby(Path(run))}")
    config = saved.read(path)
    if problems := unreadable(config):
        raise CheckpointError([f"{path}: {problem}" for problem in problems])
    parsed = [override for override in parse(overrides) if not override.key_or_group.startswith("hydra")]
    for override in parsed:
        if override.key_or_group in groups():
            raise ConfigError(
                f"{override.key_or_group}: a finished run's groups can't be replaced; set single keys of them"
            )
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
        except OmegaConfBaseException as error:
            raise CheckpointError(f"{path}: has no group for {override.key_or_group}; restore the file") from error
    saved.refuse_code(config, path, {override.key_or_group for override in parsed})
    return config


def _runs_nearby(path: Path) -> str:
    if sweep_file.exists(path):
        return "; a sweep goes on with -m"
    runs = sorted(config.parent.name for config in path.parent.glob("*/config.yaml"))
    return f"; runs in {path.parent}: {', '.join(runs[-5:])}" if runs else ""


def overlay(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """For commands that use a finished run: its config with the keys of `overrides` applied. Raises VlmtuneError."""
    usable, problems = normalise(overrides)
    if composed.get("run") is None:
        problems.append("run: missing; give a run folder, for instance run=outputs/runs/<stamp>")
    problems += [
        f"{override}: has no effect on a finished run; leave it out"
        for override in (each.lstrip("+") for each in usable)
        if re.match(r"(resume|preflight)=|(optimizer|tracker|adapter)\.(?!megatron_core)", override)
    ]
    if problems:
        raise ConfigError(problems)
    own = [o for o in usable if o.lstrip("+").split("=")[0] not in ("run", "output")]
    config = saved_config(composed.run, own)
    OmegaConf.update(config, "data.streaming", False)  # the run's own value was for its training rows
    if names(own, "data.test") and not names(own, "data.image_root") and not _own_test(composed.run, config):
        OmegaConf.update(config, "data.image_root", None)  # the run's own value was for its own tables
    return strict(config)


def names(overrides: Sequence[str], key: str) -> bool:
    """Whether one of the overrides sets `key`, or a key inside it."""
    return any(f"{override.key_or_group}.".startswith(f"{key}.") for override in parse(overrides))


def _own_test(run: str | Path, config: DictConfig) -> bool:
    """Whether `data.test` is the same as in the run itself."""
    own = saved.read(Path(run).expanduser() / "config.yaml")
    before, now = (
        [Path(name).expanduser().absolute() for name in files_of(OmegaConf.select(one, "data.test"))]
        for one in (own, config)
    )
    return now == before
