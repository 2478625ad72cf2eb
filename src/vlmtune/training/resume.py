"""Whether a run that goes on is the same run: what must be equal, what may change, and what to say of either.

`KINDS` gives each config key its kind. What follows from several keys, or from files, is compared by its value:
`Batches.identity`, and `identity` here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from vlmtune.config.saved import present_name
from vlmtune.config.schema import OPEN_GROUPS, Config, plain
from vlmtune.errors import CheckpointError
from vlmtune.record import runfolder

log = logging.getLogger("vlmtune")


class Kind(Enum):
    SAME = "part of what the run is: another value is refused"
    STEPS = "may change: takes effect from the next step on, and is recorded"
    AROUND = "may change: takes effect outside of the steps, or only by what `identity` compares, and is recorded"
    FREE = "changes nothing that is computed"


KINDS: dict[str, Kind] = {
    "adapter": Kind.SAME,
    "data._target_": Kind.SAME,
    "data.answer_lists": Kind.SAME,
    "data.cache_features": Kind.AROUND,
    "data.cache_folder": Kind.FREE,
    "data.cache_gb": Kind.FREE,
    "data.check_images": Kind.FREE,
    "data.columns": Kind.SAME,
    "data.fast_jpeg": Kind.SAME,
    "data.header": Kind.SAME,
    "data.ignore": Kind.AROUND,
    "data.image_root": Kind.AROUND,
    "data.image_name": Kind.SAME,
    "data.image_separator": Kind.SAME,
    "data.max_bad_fraction": Kind.FREE,
    "data.max_eval_rows": Kind.AROUND,
    "data.max_image_pixels": Kind.AROUND,
    "data.max_train_rows": Kind.SAME,
    "data.on_bad_row": Kind.AROUND,
    "data.on_duplicate": Kind.AROUND,
    "data.shuffle_buffer": Kind.SAME,
    "data.streaming": Kind.SAME,
    "data.subset": Kind.SAME,
    "data.supervise": Kind.SAME,
    "data.test": Kind.AROUND,
    "data.train": Kind.AROUND,
    "data.validation": Kind.AROUND,
    "data.validation_fraction": Kind.SAME,
    "generation": Kind.AROUND,
    "model.attention": Kind.STEPS,
    "model.dtype": Kind.SAME,
    "model.freeze": Kind.SAME,
    "model.fresh": Kind.SAME,
    "model.image": Kind.SAME,
    "model.name": Kind.FREE,
    "model.path": Kind.AROUND,
    "model.revision": Kind.SAME,
    "model.rewrites": Kind.STEPS,
    "model.save_layout": Kind.AROUND,
    "model.system_prompt": Kind.SAME,
    "model.trust_remote_code": Kind.FREE,
    "optimizer.beta1": Kind.STEPS,
    "optimizer.beta2": Kind.STEPS,
    "optimizer.eps": Kind.STEPS,
    "optimizer.loraplus_lr_ratio": Kind.SAME,
    "optimizer.momentum": Kind.STEPS,
    "optimizer.name": Kind.SAME,
    "optimizer.weight_decay": Kind.STEPS,
    "preflight": Kind.FREE,
    "quantization": Kind.SAME,
    "resume": Kind.FREE,
    "task.caption_prompt": Kind.SAME,
    "task.metrics": Kind.AROUND,
    "task.name": Kind.FREE,
    "tracker": Kind.FREE,
    "trainer.batch_size": Kind.AROUND,
    "trainer.batch_tokens": Kind.AROUND,
    "trainer.best_metric": Kind.SAME,
    "trainer.early_stopping_patience": Kind.AROUND,
    "trainer.epochs": Kind.AROUND,
    "trainer.eval_baseline": Kind.FREE,
    "trainer.eval_batch_size": Kind.FREE,
    "trainer.eval_every": Kind.AROUND,
    "trainer.gradient_accumulation_steps": Kind.AROUND,
    "trainer.gradient_checkpointing": Kind.STEPS,
    "trainer.keep_checkpoints": Kind.FREE,
    "trainer.learning_rate": Kind.STEPS,
    "trainer.learning_rate_of": Kind.STEPS,
    "trainer.log_every": Kind.FREE,
    "trainer.max_grad_norm": Kind.STEPS,
    "trainer.max_steps": Kind.AROUND,
    "trainer.nonfinite": Kind.STEPS,
    "trainer.num_workers": Kind.FREE,
    "trainer.precision": Kind.AROUND,
    "trainer.save_every": Kind.FREE,
    "trainer.scheduler": Kind.STEPS,
    "trainer.seed": Kind.AROUND,
    "trainer.share_prefix": Kind.AROUND,
}
"""Of each key, or of all keys of a group that has no entry per key."""

WAYS_OUT = {
    "rows per step": "it is trainer.batch_size x trainer.gradient_accumulation_steps x processes",
    "tokens per forward pass": "set trainer.batch_tokens to what it was",
    "training rows": "the rows are others than those that were trained on",
    "data fingerprint": "the rows are others than those that were trained on",
    "image content": "the images are others than those that were trained on",
    "seed": "set trainer.seed to what it was",
    "share_prefix": "set trainer.share_prefix to what it was (True is on, False off)",
    "steps in all": "the learning rate comes down to its end at the last step, so a run gets no longer or shorter "
    "unless trainer.scheduler.name=constant",
    "model files": "the base model is another one; set model.path and model.revision to the one that was trained",
    "compute type": "set trainer.precision to what it was, on a device that has it (no: fp32)",
}
"""For what follows from several keys or from files: what to do where it differs."""


def identity(config: Config, batches: Any, engine: Any, model_files: str) -> dict[str, Any]:
    """Everything about a run that one which goes on from it is compared in, as a checkpoint holds it."""
    found = {
        **batches.identity,
        "model files": model_files,
        "compute type": engine.mixed_precision,
        "processes": engine.num_processes,
        "config": values(runfolder.absolute(config)),
    }
    return json.loads(json.dumps(found))


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Each key of a config with its value: `trainer.seed`, `adapter.r`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if key in OPEN_GROUPS:
            found |= {f"{key}.{name}": each for name, each in plain(value).items()}
        elif dataclasses.is_dataclass(value):
            found |= values(value, f"{key}.")
        else:
            found[key] = value
    return found


def kind_of(key: str) -> Kind:
    """The kind of a key, or that of its group. Raises KeyError for one that has none."""
    return KINDS[key] if key in KINDS or "." not in key else kind_of(key.rpartition(".")[0])


def changes(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """What a run that goes on from the checkpoint `folder` at `step` changes, which is logged.

    `was`, `now`: identities. Raises CheckpointError that names all differences that would make it another run.
    """
    found, problems = [], []
    if missing := sorted(now.keys() - was.keys()):
        log.warning("%s: an older version wrote it; not compared with it: %s", folder, ", ".join(missing))
    for name, before, value in _differences(was, now):
        if _may_change(name, now):
            found.append({"step": step, "key": name, "was": before, "now": value})
        else:
            problems.append(f"{name} was {before}, now {value}: {_way_out(name, before, now)}")
    done = step >= now.get("steps in all", step + 1)
    for key, before, value in _different_keys(was, now):
        if kind_of(key) is Kind.SAME:
            problems.append(f"{key} was {before}, now {value}: it is part of what the run is")
        elif kind_of(key) is Kind.STEPS and done:
            problems.append(f"{key} was {before}, now {value}: all {step} steps are done, so it would change nothing")
        elif kind_of(key) is not Kind.FREE:
            found.append({"step": step, "key": key, "was": before, "now": value})
    if problems:
        model = folder.parent.parent / "model"
        problems[-1] += f". For another run choose another hydra.run.dir; model.path={model} starts from this model"
        raise CheckpointError([f"{folder}: {problem}" for problem in problems])
    for change in found:
        log.info("changed on resume: %s %s -> %s", change["key"], change["was"], change["now"])
    return found


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs of what follows from several keys or from files: its name, then and now."""
    for name in now:
        if name != "config" and name in was and was[name] != now[name]:
            yield name, was[name], now[name]


def _different_keys(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Config keys that differ, with their values then and now.

    Keys that an older version did not know are not compared; fields of PEFT's and transformers' own classes are null
    where they are not set.
    """
    before, after = dict(was.get("config", {})), now.get("config", {})
    if "data._target_" in before:
        before["data._target_"] = present_name(before["data._target_"])
    for key in sorted(before.keys() | after.keys()):
        known = key.split(".")[0] in OPEN_GROUPS or (key in before and key in after)
        if before and after and known and before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _may_change(name: str, now: Mapping[str, Any]) -> bool:
    constant = now.get("config", {}).get("trainer.scheduler.name") == "constant"
    return name == "processes" or (name == "steps in all" and constant)


def _way_out(name: str, was: Any, now: Mapping[str, Any]) -> str:
    """What to do about another value of `name`."""
    way, config = WAYS_OUT.get(name, "this would be another run"), now.get("config", {})
    if name != "rows per step" or not config:
        return way
    passes = config["trainer.gradient_accumulation_steps"] * now["processes"]
    factors = f"{way}, now {config['trainer.batch_size']} x {passes // now['processes']} x {now['processes']}"
    return factors + (f"; set trainer.batch_size={was // passes}" if was % passes == 0 else "; make it what it was")


def nothing_saved(run: Path) -> str:
    """Why a run without a checkpoint can't be gone on with, and what to do instead."""
    result = runfolder.read_result(run)
    if result is not None and result["status"] == "completed":
        return (
            f"resume={run}: the run is complete and saved no checkpoint to go on from; to train its model further, "
            f"start a new run from it: model.path={run / 'model'}"
        )
    return (
        f"resume={run}: has no checkpoint; it stopped before the first one was saved. Start it again instead: its own "
        f"command with hydra.run.dir={run}"
    )
