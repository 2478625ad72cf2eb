"""Whether a resumed run is still the same run: what must be equal, what may change, and how both are reported.

`RULES` gives each config key its rule. What follows from several keys, or from files, is compared by its value:
`Loader.identity`, and `identity` here.
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
from vlmtune.launch.engine import Engine
from vlmtune.record import runfolder

log = logging.getLogger("vlmtune")


class Rule(Enum):
    FIXED = "part of what the run is: another value is refused"
    NEXT_STEP = "may change: takes effect from the next step and is recorded"
    RECORDED = "may change: takes effect outside the steps, or only where `identity` differs, and is recorded"
    FREE = "may change: affects nothing that is computed"


RULES: dict[str, Rule] = {
    "adapter": Rule.FIXED,
    "backend": Rule.FREE,
    "data._target_": Rule.FIXED,
    "data.answer_lists": Rule.FIXED,
    "data.cache_features": Rule.RECORDED,
    "data.cache_folder": Rule.FREE,
    "data.cache_gb": Rule.FREE,
    "data.check_images": Rule.FREE,
    "data.columns": Rule.FIXED,
    "data.fast_jpeg": Rule.FIXED,
    "data.header": Rule.FIXED,
    "data.ignore": Rule.RECORDED,
    "data.image_root": Rule.RECORDED,
    "data.image_name": Rule.FIXED,
    "data.image_separator": Rule.FIXED,
    "data.max_bad_fraction": Rule.FREE,
    "data.max_eval_rows": Rule.RECORDED,
    "data.max_image_pixels": Rule.RECORDED,
    "data.max_train_rows": Rule.FIXED,
    "data.on_bad_row": Rule.RECORDED,
    "data.on_duplicate": Rule.RECORDED,
    "data.shuffle_buffer": Rule.FIXED,
    "data.streaming": Rule.FIXED,
    "data.subset": Rule.FIXED,
    "data.supervise": Rule.FIXED,
    "data.test": Rule.RECORDED,
    "data.train": Rule.RECORDED,
    "data.validation": Rule.RECORDED,
    "data.validation_fraction": Rule.FIXED,
    "generation": Rule.RECORDED,
    "model.architecture": Rule.FREE,
    "model.attention": Rule.NEXT_STEP,
    "model.dtype": Rule.FIXED,
    "model.freeze": Rule.FIXED,
    "model.fresh": Rule.FIXED,
    "model.image": Rule.FIXED,
    "model.name": Rule.FREE,
    "model.path": Rule.RECORDED,
    "model.revision": Rule.FIXED,
    "model.rewrites": Rule.NEXT_STEP,
    "model.save_layout": Rule.RECORDED,
    "model.system_prompt": Rule.FIXED,
    "model.trust_remote_code": Rule.FREE,
    "optimizer.beta1": Rule.NEXT_STEP,
    "optimizer.beta2": Rule.NEXT_STEP,
    "optimizer.eps": Rule.NEXT_STEP,
    "optimizer.loraplus_lr_ratio": Rule.FIXED,
    "optimizer.momentum": Rule.NEXT_STEP,
    "optimizer.name": Rule.FIXED,
    "optimizer.offload": Rule.NEXT_STEP,
    "optimizer.rounding": Rule.NEXT_STEP,
    "optimizer.step_in_backward": Rule.FREE,
    "optimizer.weight_decay": Rule.NEXT_STEP,
    "preflight": Rule.FREE,
    "quantization": Rule.FIXED,
    "resume": Rule.FREE,
    "sharding": Rule.FREE,
    "task.caption_prompt": Rule.FIXED,
    "task.metrics": Rule.RECORDED,
    "task.name": Rule.FREE,
    "task.slices": Rule.FREE,
    "tracker": Rule.FREE,
    "trainer.auto_micro_batch": Rule.FREE,
    "trainer.batch_size": Rule.RECORDED,
    "trainer.batch_tokens": Rule.RECORDED,
    "trainer.best_metric": Rule.FIXED,
    "trainer.early_stopping_patience": Rule.RECORDED,
    "trainer.epochs": Rule.RECORDED,
    "trainer.eval_baseline": Rule.FREE,
    "trainer.eval_batch_size": Rule.FREE,
    "trainer.eval_every": Rule.RECORDED,
    "trainer.gradient_accumulation_steps": Rule.FIXED,
    "trainer.gradient_checkpointing": Rule.NEXT_STEP,
    "trainer.keep_checkpoints": Rule.FREE,
    "trainer.learning_rate": Rule.NEXT_STEP,
    "trainer.learning_rate_of": Rule.NEXT_STEP,
    "trainer.log_every": Rule.FREE,
    "trainer.max_grad_norm": Rule.NEXT_STEP,
    "trainer.max_steps": Rule.RECORDED,
    "trainer.nonfinite": Rule.NEXT_STEP,
    "trainer.passes_per_step": Rule.RECORDED,
    "trainer.num_workers": Rule.FREE,
    "trainer.precision": Rule.RECORDED,
    "trainer.rows_per_step": Rule.RECORDED,
    "trainer.save_every": Rule.FREE,
    "trainer.scheduler": Rule.NEXT_STEP,
    "trainer.seed": Rule.RECORDED,
    "trainer.share_prefix": Rule.RECORDED,
    "trainer.tf32": Rule.NEXT_STEP,
}
"""The rule of each key, or of all keys of a group that has one entry."""

WAYS_OUT = {
    "rows per step": "set trainer.rows_per_step={was}",
    "passes per step": "set trainer.passes_per_step={was}",
    "tokens per forward pass": "set trainer.batch_tokens back to its earlier value",
    "training rows": "the rows differ from those that the run was trained on",
    "data fingerprint": "the rows differ from those that the run was trained on",
    "image content": "the images differ from those that the run was trained on",
    "seed": "set trainer.seed back to its earlier value",
    "share_prefix": "set trainer.share_prefix back to its earlier value (True is on, False off)",
    "model files": "the base model is a different one; set model.path and model.revision to the one that was trained",
    "compute type": "set trainer.precision back to its earlier value (no: fp32), on a device that supports it",
}
"""What to do if a value that follows from several keys or from files differs."""


def identity(config: Config, batches: Any, engine: Engine, model_files: str) -> dict[str, Any]:
    """Everything about a run that a resumed run is compared with, in the form that a checkpoint stores."""
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


def rule_of(key: str) -> Rule:
    """The rule of a key, or of its group. Raises KeyError for a key without a rule."""
    return RULES[key] if key in RULES or "." not in key else rule_of(key.rpartition(".")[0])


def changes(
    folder: Path, was: Mapping[str, Any], now: Mapping[str, Any], step: int, *, since_best: int = 0
) -> list[dict[str, Any]]:
    """What a run changes that resumes from the checkpoint `folder` at `step`; the changes are logged.

    `was`, `now`: identities. `since_best`: evaluations since the best one. Raises CheckpointError with all differences
    that would make it a different run.
    """
    found, problems = [], []
    if missing := sorted(now.keys() - was.keys()):
        log.warning("%s: written by an older version; not compared: %s", folder, ", ".join(missing))
    for name, before, value in _differences(was, now):
        length = _of_length(before, value, now, step, since_best) if name == "steps in all" else None
        way = WAYS_OUT.get(name, "this would be a different run").format(was=before)
        reason = length if name in ("processes", "steps in all") else way
        if reason:
            problems.append(f"{name} was {before}, now {value}: {reason}")
        else:
            found.append({"step": step, "key": name, "was": before, "now": value})
    for key, before, value in _different_keys(was, now):
        if reason := _of_key(key, now, step):
            problems.append(f"{key} was {before}, now {value}: {reason}")
        elif rule_of(key) is not Rule.FREE:
            found.append({"step": step, "key": key, "was": before, "now": value})
    if problems:
        adapter = now.get("config", {}).get("adapter.method") is not None
        start = started_from(folder.parent.parent, adapter)
        problems[-1] += f". For a different run choose a new hydra.run.dir; {start} starts it from this one's model"
        raise CheckpointError([f"{folder}: {problem}" for problem in problems])
    for change in found:
        log.info("changed on resume: %s %s -> %s", change["key"], change["was"], change["now"])
    return found


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Differences in what follows from several keys or from files: the name, the value then and now."""
    for name in now:
        if name != "config" and name in was and was[name] != now[name]:
            yield name, was[name], now[name]


def _different_keys(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Config keys that differ, with their values then and now.

    Keys that an older version did not know are not compared. Fields of PEFT's and transformers' classes are null if
    they are not set.
    """
    before, after = dict(was.get("config", {})), now.get("config", {})
    if "data._target_" in before:
        before["data._target_"] = present_name(before["data._target_"])
    for key in sorted(before.keys() | after.keys()):
        known = key.split(".")[0] in OPEN_GROUPS or (key in before and key in after)
        if before and after and known and before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _of_key(key: str, now: Mapping[str, Any], step: int) -> str | None:
    """Why a key can't have another value now, after `step`; None where it can."""
    if key == "trainer.epochs" and (most := now["config"]["trainer.max_steps"]) is not None:
        return f"trainer.max_steps={most} overrides it; set that one, or set it to null"
    if rule_of(key) is Rule.FIXED:
        return "it can't change on resume"
    if rule_of(key) is Rule.NEXT_STEP and step >= now.get("steps in all", step + 1):
        return f"all {step} steps are done, so it would change nothing"
    return None


def _of_length(before: int, value: int, now: Mapping[str, Any], step: int, since_best: int) -> str | None:
    """Why a run of `before` steps in all can't have `value` now, after `step`; None where it can."""
    config = now.get("config", {})
    schedule, patience = config.get("trainer.scheduler.name"), config.get("trainer.early_stopping_patience")
    if value < step:
        return f"{step} steps are done already; a smaller trainer.max_steps or trainer.epochs can't undo them"
    if schedule != "constant":
        return (
            f"the {schedule} schedule is spread over all steps, so their number can't change. To go on at "
            f"trainer.learning_rate={config.get('trainer.learning_rate')} add trainer.scheduler.name=constant"
        )
    if value > before and patience is not None and since_best >= patience:
        return (
            f"the run stopped early ({since_best} evaluations in a row without a better one). To go on add "
            "trainer.early_stopping_patience=null, or a larger number"
        )
    return None


def started_from(run: Path, adapter: bool) -> str:
    """The keys of a new run that starts from the model of `run`: an adapter, or a whole model."""
    return f"adapter.from={run}" if adapter else f"model=auto model.path={run / 'model'}"


def nothing_saved(run: Path) -> str:
    """Why a run without a checkpoint can't be resumed, and what to do instead."""
    result = runfolder.read_result(run)
    if result is not None and result["status"] == "completed":
        adapter = (run / "model" / "adapter_config.json").exists()
        return (
            f"resume={run}: the run is complete and has no checkpoint to resume from. To train its model further, "
            f"start a new run: {started_from(run, adapter)}"
        )
    return (
        f"resume={run}: has no checkpoint; it stopped before the first one was saved. Start it again with the same "
        f"command and hydra.run.dir={run}"
    )
