"""The optimizer over all trainable weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from vlmtune.config.schema import OptimizerConfig, TrainerConfig
from vlmtune.config.together import NO_FP16_WEIGHTS, NO_SCALER
from vlmtune.errors import ConfigError
from vlmtune.launch.engine import Engine
from vlmtune.models.parts import Parts, hidden_matrices
from vlmtune.training.tensorwise import Tensorwise

log = logging.getLogger("vlmtune")


def build_optimizer(
    model: nn.Module, parts: Parts, trainer: TrainerConfig, optimizer: OptimizerConfig, engine: Engine
) -> torch.optim.Optimizer:
    """An optimizer over every trainable weight, grouped by learning rate and weight decay.

    Raises ConfigError if a learning rate is set for a part without trainable weights, or if
    this optimizer can't train these weights on this machine.
    """
    groups = parameter_groups(model, parts, trainer, optimizer)
    weights = [p for group in groups for p in group["params"]]
    _refuse(weights, optimizer, engine)
    inner = _plain(groups, optimizer)
    _warn_of_nearest(weights, optimizer)
    rounds = optimizer.rounding == "stochastic" and any(p.dtype is torch.bfloat16 for p in weights)
    if not (rounds or optimizer.offload or optimizer.step_in_backward or optimizer.name in BITSANDBYTES):
        return inner
    return Tensorwise(
        inner,
        stochastic=rounds,
        offload=optimizer.offload,
        in_backward=optimizer.step_in_backward,
        seed=trainer.seed,
    )


BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
"""Its class for each name."""


def _plain(groups: list[dict[str, Any]], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of torch or bitsandbytes."""
    options: dict[str, Any] = {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    if optimizer.name in BITSANDBYTES:
        import bitsandbytes

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[optimizer.name])(groups, **options)
        return made
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for g in groups for p in g["params"])
    if optimizer.name == "muon":
        return MuonAndAdamW(groups, momentum=optimizer.momentum, fused=fused, **options)
    return torch.optim.AdamW(groups, fused=fused, **options)


def _refuse(weights: list[nn.Parameter], optimizer: OptimizerConfig, engine: Engine) -> None:
    """Raise ConfigError for what can't work. config/together.py refuses what the config alone shows."""
    problems = []
    if any(p.dtype is torch.float16 for p in weights):
        problems.append(f"model.dtype: {NO_FP16_WEIGHTS}")
    if optimizer.step_in_backward and engine.num_processes > 1:
        problems.append(
            "optimizer.step_in_backward: is for one process; with several, a gradient is not complete before the "
            "backward pass has ended on all"
        )
    if optimizer.step_in_backward and engine.scaler is not None:
        problems.append(f"optimizer.step_in_backward: {NO_SCALER}")
    if problems:
        raise ConfigError(problems)


def _warn_of_nearest(weights: list[nn.Parameter], optimizer: OptimizerConfig) -> None:
    lost = sum(p.numel() for p in weights if p.dtype is torch.bfloat16) if optimizer.rounding == "nearest" else 0
    if lost:
        log.warning(
            "optimizer.rounding=nearest: %.1f million trained weights are bf16, and an update below 1/512 of a weight "
            "is lost; use rounding=stochastic or model.dtype=fp32",
            lost / 1e6,
        )


def parameter_groups(
    model: nn.Module, parts: Parts, trainer: TrainerConfig, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """torch's parameter groups: by part, by weight decay, by optimizer (Muon or AdamW), by LoRA+'s learning rate.

    Raises ConfigError as `build_optimizer` does.
    """
    hidden = hidden_matrices(model) if optimizer.name == "muon" else set()
    ratio = optimizer.loraplus_lr_ratio
    groups: dict[tuple[str, bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            faster = ratio != 1 and ("lora_B" in name or "lora_embedding_B" in name)
            group = (parts.of(name), parameter.dim() > 1, name in hidden, faster)
            groups.setdefault(group, []).append(parameter)
    unused = sorted(set(trainer.learning_rate_of) - {part for part, *_ in groups})
    if unused:
        raise ConfigError([f"trainer.learning_rate_of.{part}: this part has no trainable weight" for part in unused])
    return [
        {
            "params": parameters,
            "lr": trainer.learning_rate_of.get(part, trainer.learning_rate) * (ratio if faster else 1),
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "part": part,
            "hidden": matrices,
        }
        for (part, decays, matrices, faster), parameters in groups.items()
    ]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on the groups marked `hidden` and AdamW on the others, as one optimizer with one state.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both (Liu et al. 2025,
    arXiv:2502.16982).
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **adamw: Any):
        super().__init__(groups, {})
        hidden, others = self._split()
        self.muon = torch.optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw") if hidden else None
        self.adamw = torch.optim.AdamW(others, **adamw) if others else None

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [g for g in groups if g["hidden"]], [g for g in groups if not g["hidden"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both. Loading a state replaces the groups, so both get them again at each step."""
        assert closure is None
        for optimizer, groups in zip((self.muon, self.adamw), self._split(), strict=True):
            if optimizer is not None:
                optimizer.param_groups, optimizer.state = groups, self.state
                optimizer.step()
