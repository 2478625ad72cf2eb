"""Which cards a run fits, how many rows of it, and what to switch on where it doesn't fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmtune.config.schema import Config, MethodConfig
from vlmtune.planning.estimate import Estimate, Plan

GIB = 2**30
CARDS = {"16 GB": 14.7, "24 GB": 23.5, "40 GB": 39.4, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.8}
"""GiB that a program can have: the least of the common cards (T4, RTX 3090 and 4090, A100, L40S, H100, H200)."""
USED = 0.95
"""The part of a card that may be planned for; the rest is for what can't be computed."""
PROCESSES = (2, 4, 8)
"""GPUs of one machine that FSDP is tried on."""


def limit(card: str) -> float:
    """Bytes of a card that a plan may use."""
    return USED * CARDS[card] * GIB


@dataclass(frozen=True)
class Variant:
    """A run with some settings changed so that it needs less memory."""

    words: tuple[str, ...]
    """The changes as overrides, in the order in which they were made."""
    config: Config
    processes: int
    estimate: Estimate


@dataclass(frozen=True)
class Fit:
    """What a card can take."""

    card: str
    fits: bool
    largest: int
    """The largest micro-batch, of the run as it is or else of `variant`; 0 where none fits."""
    variant: Variant | None
    """The run with the fewest changes that fits; None where it fits as it is, or never."""


def fits(plan: Plan, config: Config, processes: int = 1) -> list[Fit]:
    """What each card can take, the smallest first."""
    found: list[Fit] = []
    own = plan.of(config, processes=processes)
    tried = [Variant((), config, processes, own)]
    further = variants(plan, config, processes)
    for card in reversed(CARDS):
        while all(variant.estimate.total > limit(card) for variant in tried):
            if (following := next(further, None)) is None:
                break
            tried.append(following)
        first = next((variant for variant in tried if variant.estimate.total <= limit(card)), None)
        largest = plan.largest(first.config, limit(card), first.processes) if first else 0
        found.append(Fit(card, own.total <= limit(card), largest, first if first and first.words else None))
    return found[::-1]


def variants(plan: Plan, config: Config, processes: int) -> Iterator[Variant]:
    """The run with one more change each time."""
    words: list[str] = []
    changed = config
    for change in CHANGES:
        after = copy.deepcopy(changed)
        if (made := change(after)) is None:
            continue
        changed, words = after, _joined(words, made)
        yield Variant(tuple(words), changed, processes, plan.of(changed, processes=processes))
    if processes > 1 or changed.optimizer.step_in_backward:
        return
    for count in PROCESSES:
        after = copy.deepcopy(changed)
        after.sharding.name, after.backend.name, after.backend.num_processes = "fsdp", "accelerate", count
        sharded = _joined(words, ["sharding=fsdp", "backend=accelerate", f"backend.num_processes={count}"])
        yield Variant(tuple(sharded), after, count, plan.of(after, processes=count))


def _joined(words: list[str], made: list[str]) -> list[str]:
    """`words` and what is new; a key that is set again has its last value."""
    keys = {word.split("=")[0] for word in made}
    return [word for word in words if word.split("=")[0] not in keys] + made


def _checkpoint(config: Config) -> list[str] | None:
    if config.trainer.gradient_checkpointing:
        return None
    config.trainer.gradient_checkpointing = True
    return ["trainer.gradient_checkpointing=true"]


def _one_row(config: Config) -> list[str] | None:
    """The rows of a step stay the same."""
    trainer = config.trainer
    if trainer.batch_size == 1 or trainer.batch_tokens is not None:
        return None
    rows = trainer.rows_per_step or trainer.batch_size * trainer.gradient_accumulation_steps
    trainer.batch_size, trainer.gradient_accumulation_steps = 1, rows
    more = [] if trainer.rows_per_step else [f"trainer.gradient_accumulation_steps={rows}"]
    return ["trainer.batch_size=1", *more]


def _halves(config: Config) -> list[str] | None:
    """All weights in bf16 in place of fp32."""
    if config.uses_adapter or config.model.dtype != "auto":
        return None
    config.model.dtype = "bf16"
    return ["model.dtype=bf16"]


def _nf4(config: Config) -> list[str] | None:
    if not config.uses_adapter or config.is_quantized or config.adapter.parts != ["language"]:
        return None
    config.quantization = MethodConfig("bitsandbytes_4bit", ["language"], dict(NF4))
    return ["quantization=nf4"]


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": None,
}
"""The fields of conf/quantization/nf4.yaml."""


def _eight_bit(config: Config) -> list[str] | None:
    if config.uses_adapter or config.optimizer.name != "adamw" or config.optimizer.offload:
        return None
    config.optimizer.name = "adamw_8bit"
    return ["optimizer=adamw_8bit"]


def _smaller_images(config: Config) -> list[str] | None:
    """Only where the bound of an image is a number of tokens of its own."""
    most = config.model.image.max_tokens
    if most is None or most <= 512 or "qwen" not in str(config.model.architecture.get("model_type", "qwen")):
        return None
    config.model.image.max_tokens = 512
    return ["model.image.max_tokens=512"]


def _in_backward(config: Config) -> list[str] | None:
    """Another run than before: without clipping, and a step has the rows of one micro-batch."""
    optimizer, trainer = config.optimizer, config.trainer
    if config.uses_adapter or optimizer.step_in_backward or config.backend.name != "local" or trainer.rows_per_step:
        return None
    optimizer.step_in_backward, trainer.max_grad_norm, trainer.gradient_accumulation_steps = True, None, 1
    words = ["optimizer.step_in_backward=true", "trainer.max_grad_norm=null"]
    return [*words, "trainer.gradient_accumulation_steps=1"]


def _offload(config: Config) -> list[str] | None:
    if config.uses_adapter or config.optimizer.offload or not config.optimizer.step_in_backward:
        return None
    config.optimizer.name, config.optimizer.offload = "adamw", True
    return ["optimizer=adamw", "optimizer.offload=true"]


CHANGES: tuple[Any, ...] = (
    *(_checkpoint, _one_row, _halves, _nf4, _eight_bit, _smaller_images, _in_backward, _offload),
)
"""In the order in which they are made: what costs least first."""
