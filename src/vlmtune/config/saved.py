"""The config.yaml of an earlier run, read as untrusted input: it may come from somebody else.

Its values are plain: an interpolation in it is text, so that it can't read the environment. Code that it names only
runs if this command line names it again.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmtune.config.schema import READ_HUB, home
from vlmtune.config.strict import literal
from vlmtune.errors import CheckpointError, ConfigError

MOVED = {
    "vlmtune.data.hub.load": READ_HUB,
    "vlmtune.data.easy_vqa.load": "vlmtune.data.sources.easy_vqa.load",
    "vlmtune.data.drawn.load": "vlmtune.data.sources.drawn.courses.load",
    "vlmtune.data.drawn.load_see": "vlmtune.data.sources.drawn.courses.load_see",
    "vlmtune.data.drawn.load_compare": "vlmtune.data.sources.drawn.courses.load_compare",
}
"""Functions in `data._target_` of runs from version 0.1, and their new names."""


def read(path: Path) -> DictConfig:
    """The values in `path`. Raises CheckpointError if it is not a config that a run wrote."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(
            isinstance(token, yaml.AliasToken) for token in yaml.scan(text)
        ):  # a few lines of aliases can fill the memory
            raise CheckpointError(
                f"{path}: contains YAML aliases (*name), which a run's config never does; restore the file"
            )
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: is damaged ({reason}); restore the file") from error
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{path}: is not a run's config; restore the file")
    data = values.get("data")
    if isinstance(data, dict) and "_target_" in data:
        data["_target_"] = present_name(data["_target_"])
    return OmegaConf.create(literal(values))


def present_name(target: Any) -> Any:
    """What is called `target` in the config of a run of any version."""
    return MOVED.get(target, target) if isinstance(target, str) else target


def refuse_links(run: Path) -> None:
    """Raise CheckpointError if a file that a resumed run appends to is a link, which could point to any file."""
    links = [run / name for name in ("train.log", "metrics.jsonl") if (run / name).is_symlink()]
    if links:
        raise CheckpointError([f"{link}: is a symbolic link; replace it with the file itself" for link in links])


def refuse_code(saved: DictConfig, path: Path, asked: Collection[str]) -> None:
    """Raise ConfigError if `saved` would run code that is neither ours nor confirmed by the keys `asked`."""
    problems = []
    metrics = [str(name) for name in OmegaConf.select(saved, "task.metrics") or []]
    own = [name for name in metrics if "." in name]
    if own and "task.metrics" not in asked:
        problems.append(_refusal(path, "task.metrics", ", ".join(own), f"[{','.join(metrics)}]"))
    for key in ("data._target_", "model.fresh", "adapter.megatron_core"):
        value = OmegaConf.select(saved, key)
        if value is not None and str(value) not in shipped(key.rpartition(".")[2]) and key not in asked:
            problems.append(_refusal(path, key, str(value), str(value)))
    if OmegaConf.select(saved, "model.trust_remote_code") and "model.trust_remote_code" not in asked:
        problems.append(
            f"{path}: that run executed its model's own code; to allow it again, set model.trust_remote_code=true"
        )
    if problems:
        raise ConfigError(problems)


def _refusal(path: Path, key: str, names: str, value: str) -> str:
    again = shlex.quote(f"{key}={value}")
    return f"{path}: {key} names code outside vlmtune, {names}; if you trust that code, repeat the key: {again}"


@functools.cache
def shipped(key: str) -> frozenset[str]:
    """The functions that YAML files in conf/ set for `key`."""
    texts = (file.read_text(encoding="utf-8") for file in (home() / "conf").rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(rf"(?m)^\s*{key}:\s*(\S+\.\S+)\s*$", text))
