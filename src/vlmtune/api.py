"""The Python interface: `vlmtune.train([...])` and `vlmtune.load(folder).predict(dataframe)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.backends import in_processes, run_in
from vlmtune.errors import ConfigError
from vlmtune.launch import processes
from vlmtune.launch.world import World
from vlmtune.predict.predictor import Predictor


def train(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train one run, as `vlmtune train ...overrides` does. Returns the content of its result.json and the run's
    `folder`.

    >>> vlmtune.train(["model=qwen2vl_7b", "adapter=lora", "data=csv", "data.train=my.csv"])  # doctest: +SKIP

    Raises VlmtuneError (ConfigError, DataError, ...).
    """
    from vlmtune.config import compose

    config, composed = compose.read("train", overrides)
    folder, world = Path(config.resumed_folder or composed.hydra.run.dir).absolute(), World.from_environment()
    count = processes.to_start(config.backend, world)
    result = run_in(folder, config, world) if count == 1 else in_processes(overrides, folder, count)
    return {**result, "folder": str(folder)}


def load(folder: str | Path, *, overrides: Sequence[str] = ()) -> Predictor:
    """Open a finished run (its folder, or the `model/` folder in it) to answer questions.

    `overrides`: keys of the run's config to change, for instance `["generation.max_new_tokens=32"]`. The run's own
    `data.image_root` is not used unless it is among them: other tables have other images.

    Raises CheckpointError if there is no run, ModelError if its base model can't be opened.
    """
    from vlmtune.config.compose import names, normalise, saved_config
    from vlmtune.config.paths import home
    from vlmtune.config.strict import strict

    path = Path(home(str(folder)))
    path = path.parent if path.name == "model" and (path.parent / "config.yaml").exists() else path
    usable, problems = normalise(overrides)
    if problems:
        raise ConfigError(problems)
    config = strict(saved_config(path, usable))
    if not names(usable, "data.image_root"):
        config.data.image_root = None
    return Predictor(path, config)


__all__ = ["Predictor", "load", "run_in", "train"]
