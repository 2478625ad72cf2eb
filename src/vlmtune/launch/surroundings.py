"""What a process brings along, and how a run keeps it apart: the caller's state is as it was when a run is over, and
decides nothing in between.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vlmtune.errors import ConfigError
from vlmtune.launch import tf32

log = logging.getLogger("vlmtune")
LOGGERS = ("vlmtune", "hydra", "bitsandbytes")
OTHER_ARITHMETIC = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "Accelerate's FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
COMPILING = "ACCELERATE_DYNAMO_"
SETTINGS = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_USE_CPU",
    COMPILING,
    "ACCELERATE_FP8_",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_SAGEMAKER_",
)
"""Variables, or their beginnings, by which `accelerate launch` hands its own config on."""
SERVICE = "WANDB_SERVICE"
"""Where W&B notes how this process and those that it starts reach its service."""
OFF = ("", "0", "false", "no", "none", "off")


@contextmanager
def without_accelerate_settings() -> Iterator[dict[str, str]]:
    """While inside, Accelerate sees none of the settings that a run's config makes itself; yields them by variable.

    Raises ConfigError where the launcher asks for another way to train altogether.
    """
    for name, what in OTHER_ARITHMETIC.items():
        if os.environ.get(name, "").lower() not in OFF:
            raise ConfigError(
                f"{name}={os.environ[name]}: vlmtune does not train with {what}; sharding=fsdp shards a model. Launch "
                "without it (accelerate launch --multi_gpu, or torchrun --nproc_per_node N), or unset the variable"
            )
    hidden = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    for name in hidden:
        del os.environ[name]
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def log_ignored(hidden: dict[str, str], used: dict[str, str]) -> None:
    """Log the settings that were `hidden`, but for those that say nothing, or what the config decided (`used`)."""
    compiles = hidden.get(f"{COMPILING}BACKEND", "").lower() not in OFF
    ignored = [
        f"{name}={value}"
        for name, value in sorted(hidden.items())
        if value.lower() not in (*OFF, used.get(name, "")) and (compiles or not name.startswith(COMPILING))
    ]
    if ignored:
        log.info("not used, as the run's config decides: %s", ", ".join(ignored))


@contextmanager
def kept() -> Iterator[None]:
    """While inside, torch is as a new process has it; afterwards the caller has back what a run changes of its process:
    random numbers, torch's defaults, loggers, warnings, the verbosity of libraries and the environment.
    """
    with ExitStack() as stack:
        stack.enter_context(_kept_python())
        stack.enter_context(tf32.kept())
        if "numpy" in sys.modules:
            stack.enter_context(_kept_numpy())
        if "torch" in sys.modules:  # else there is nothing of the caller's in it
            stack.enter_context(_plain_torch())
        yield


@contextmanager
def _kept_python() -> Iterator[None]:
    state, environment = random.getstate(), dict(os.environ)
    loggers = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in LOGGERS}
    try:
        with warnings.catch_warnings(), _kept_transformers():
            yield
    finally:
        random.setstate(state)
        for name, (level, propagate) in loggers.items():
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).propagate = propagate
        environment.pop(SERVICE, None)  # W&B's own: a run may have begun one, or lost the one that was there
        for name in [name for name in os.environ if name not in environment and not name.startswith("WANDB")]:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


@contextmanager
def _kept_transformers() -> Iterator[None]:
    before = _verbosity()
    try:
        yield
    finally:
        if "transformers" in sys.modules:
            from transformers.utils import logging as library

            verbosity, bars = before or (logging.WARNING, True)  # its own defaults, where we imported it
            library.set_verbosity(verbosity)
            (library.enable_progress_bar if bars else library.disable_progress_bar)()


def _verbosity() -> tuple[int, bool] | None:
    if "transformers" not in sys.modules:
        return None
    from transformers.utils import logging as library

    return library.get_verbosity(), library.is_progress_bar_enabled()


@contextmanager
def _kept_numpy() -> Iterator[None]:
    import numpy as np

    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """The caller's number type, device, gradient mode, autocast and random numbers set aside."""
    import torch

    dtype, before = torch.get_default_dtype(), random_state()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            set_random_state(before)


def random_state() -> dict[str, Any]:
    """torch's random state on the CPU and, where one is in use, on the accelerator."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
