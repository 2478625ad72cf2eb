"""The runs whose adapters are merged: what their files say, compared before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmtune import durable
from vlmtune.config import saved
from vlmtune.config.adapter_source import CONFIG, read_json
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.export.options import EQUAL_RANKS, Options

COMBINABLE = ("lora", "ia3")
"""PEFT's methods of which several adapters can become one."""
OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""LoRA's starts that change the base model's weights: each adapter is then over other ones."""


@dataclass(frozen=True)
class Source:
    """One run with an adapter."""

    run: Path
    model: Path
    """The folder of its adapter."""
    config: DictConfig
    """Its config.yaml."""
    adapter: dict[str, Any]
    """PEFT's adapter_config.json."""
    base: str
    """What it was trained over: what identifies its weights, or its name where the run did not note that."""
    noted: bool
    """Whether the run noted it."""

    @property
    def kind(self) -> str:
        return str(self.adapter.get("peft_type")).lower()

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max([int(self.adapter.get("r") or 0), *(self.adapter.get("rank_pattern") or {}).values()])


def read(folder: str) -> Source:
    """The run in `folder`. Raises CheckpointError where it has no adapter."""
    run = Path(folder).expanduser()
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: is not a run folder (it has no config.yaml)")
    model = durable.existing(run / "model")
    if not model.is_dir():
        raise CheckpointError(f"{folder}: this run has not saved a model; its result.json says why")
    if not (model / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no adapter to merge: it trained whole weights, and model/ is complete")
    config = saved.read(run / "config.yaml")
    noted = run / "environment.json"
    base = read_json(noted).get("base_model") if noted.is_file() else None
    named = f"{OmegaConf.select(config, 'model.path')}@{OmegaConf.select(config, 'model.revision')}"
    return Source(run, model, config, read_json(model / CONFIG), str(base or named), base is not None)


def read_all(options: Options) -> list[Source]:
    """The runs of `options`. Raises CheckpointError for a run without an adapter, and ConfigError with all reasons why
    they can't be merged together.
    """
    found = [read(folder) for folder in options.folders]
    problems = [f"{source.run}: {reason}" for source in found for reason in _alone(source)]
    if len(found) > 1:
        problems += _base_problems(found) + _kind_problems(found, options)
        problems += [f"{source.run}: {reason}" for source in found for reason in _beside(source)]
    if problems:
        raise ConfigError(problems)
    return found


def _alone(source: Source) -> list[str]:
    if source.adapter.get("init_lora_weights") == "loftq":
        return ["adapter.init_lora_weights=loftq: it corrects the quantized base, and is wrong over any other"]
    return []


def _base_problems(found: list[Source]) -> list[str]:
    first, *others = found
    return [
        f"{other.run}: was trained over another base model than {first.run} ({other.base}, and {first.base}); only "
        "adapters over the same base can be merged"
        for other in others
        if other.base != first.base
    ]


def _kind_problems(found: list[Source], options: Options) -> list[str]:
    kinds: dict[str, Source] = {}
    for source in found:
        kinds.setdefault(source.kind, source)
    if other := [kind for kind in kinds if kind not in COMBINABLE]:
        return [
            f"{kinds[kind].run}: several adapters of the method {kind} can't become one; only those of "
            f"{' or '.join(COMBINABLE)} can. Merge it alone: run={kinds[kind].run}"
            for kind in other
        ]
    if len(kinds) > 1:
        return [
            f"{' and '.join(str(s.run) for s in kinds.values())}: one is {' and one '.join(kinds)}; merge alike ones"
        ]
    if [*kinds] == ["ia3"]:
        wrong = [name for name in options.tried if name != "linear"]
        return [f"method={name}: IA3 adapters can only be merged with method=linear" for name in wrong]
    return _rank_problems(found, options)


def _rank_problems(found: list[Source], options: Options) -> list[str]:
    ranks = ", ".join(f"{source.run} has r={source.rank}" for source in found)
    if len({source.rank for source in found}) == 1:
        return []
    can = "cat, svd, ties_svd, dare_linear_svd, dare_ties_svd or magnitude_prune_svd"
    wrong = [name for name in options.tried if name in EQUAL_RANKS]
    return [f"method={name}: needs adapters of equal rank, and {ranks}; use {can}" for name in wrong]


def _beside(source: Source) -> list[str]:
    """What an adapter has that a weighted sum of several would leave out."""
    adapter, found = source.adapter, []
    if adapter.get("use_dora"):
        found.append("adapter.use_dora=true: DoRA's magnitudes have no weighted sum; merge it alone")
    if adapter.get("bias") not in (None, "none") or adapter.get("lora_bias"):
        found.append("adapter.bias: the sum would leave out trained biases; merge it alone")
    if (start := str(adapter.get("init_lora_weights")).split("_niter")[0]) in OF_THE_BASE:
        found.append(f"adapter.init_lora_weights={start}: it changed the base's weights for itself; merge it alone")
    lost = ("modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora")
    return found + [f"adapter.{key}: the sum would leave it out; merge it alone" for key in lost if adapter.get(key)]
