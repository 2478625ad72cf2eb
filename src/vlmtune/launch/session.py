"""What a run needs of the machine it is on: processes, devices, number types, one folder, signals."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmtune import display
from vlmtune.commands import launched
from vlmtune.config.schema import Config
from vlmtune.errors import ConfigError, VlmtuneError
from vlmtune.launch import surroundings
from vlmtune.launch.engine import Engine

log = logging.getLogger("vlmtune")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def engine(config: Config) -> Engine:
    """The Accelerator: devices and processes as launched, `trainer.precision`, and all seeds set.

    Raises ConfigError where the device can't compute in the asked precision.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, set_seed

    quiet_libraries()
    mixed = mixed_precision(config.trainer.precision)
    decided = {"ACCELERATE_MIXED_PRECISION": mixed, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    forget_precision()
    set_seed(config.trainer.seed)
    # a tower, or a module trained beside an adapter, gets no gradient from rows without images
    beside = config.adapter.parts != ["language"] or bool(config.adapter.fields.get("modules_to_save"))
    unused = not config.uses_adapter or beside
    with surroundings.without_accelerate_settings(decided):
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # or a launcher's CPU ranks would each believe to be alone
            mixed_precision=mixed,
            gradient_accumulation_plugin=GradientAccumulationPlugin(  # the loop accumulates by itself
                num_steps=1, sync_with_dataloader=False
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    accelerator.sync_gradients = True  # or a loop left half way in this process decides whether a step counts
    log_idle_devices(accelerator)
    made: Engine = accelerator
    return made


def forget_precision() -> None:
    """Let the next Accelerator compute in another precision than the last one of this process.

    A multirun's jobs may differ. Accelerate keeps the first precision for the process and refuses another; as of 1.15
    it has no public way to change that, in `Accelerator`, `AcceleratorState` or `PartialState`.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def quiet_libraries() -> None:
    """No warnings that libraries mean for us, and no bars where there is no terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what matters of it is raised or logged by us
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells of kernels to install
    for package in ("transformers", "peft", "bitsandbytes", "torch"):  # their deprecations are for us, not for users
        warnings.filterwarnings("ignore", category=FutureWarning, module=package)
    if not display.console.is_terminal:
        transformers_logging.disable_progress_bar()


def mixed_precision(precision: str) -> str:
    """Accelerate's name for `trainer.precision` on this machine. Raises ConfigError where it can't compute so."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=fp16: needs an accelerator; use fp32 (or bf16) on a CPU")
    if precision == "bf16" and torch.cuda.is_available() and not bf16:
        raise ConfigError("trainer.precision=bf16: this GPU has no bfloat16; use fp16 or fp32")
    return "no" if precision == "fp32" else precision


def log_idle_devices(engine: Engine) -> None:
    """Log the accelerators of this machine that the run leaves alone, and why."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type != "cuda":
        log.info(
            "computing on the CPU: this machine has %s, which vlmtune does not use (only CUDA and ROCm)", found.type
        )
    if engine.num_processes == 1 and torch.cuda.device_count() > 1:
        again = launched("train")
        log.info(
            "computing on one of %d GPUs; all of them: accelerate launch --multi_gpu %s ...",
            torch.cuda.device_count(),
            again,
        )


def dtypes(config: Config, engine: Engine) -> dict[str, torch.dtype]:
    """`compute_dtype`, and the `dtype` of the weights: frozen ones in the compute type, trained ones in fp32."""
    compute = DTYPES.get(engine.mixed_precision, torch.float32)
    if config.model.dtype != "auto":
        return {"dtype": DTYPES[config.model.dtype], "compute_dtype": compute}
    return {"dtype": compute if config.uses_adapter else torch.float32, "compute_dtype": compute}


def agree_on_folder(folder: Path | None, config: Config, engine: Engine) -> Path:
    """The first rank's run folder, on every rank, and its `config.resume`: only it looks at the folder."""
    from accelerate.utils import broadcast_object_list

    agreed = [str(folder), config.resume]
    if engine.num_processes > 1:
        broadcast_object_list(agreed)
    config.resume = agreed[1]
    return Path(str(agreed[0]))


def decided_by_first(decide: Callable[[], Any], engine: Engine) -> Any:
    """What `decide` returns on the first rank, on every rank; where it raises a VlmtuneError, every rank does."""
    from accelerate.utils import broadcast_object_list

    if engine.num_processes == 1:
        return decide()
    found: list[Any] = [None, None]
    if engine.is_main_process:
        try:
            found[0] = decide()
        except VlmtuneError as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def all_ranks(yes: bool, engine: Engine) -> bool:
    """True where every rank says yes; the same answer on each."""
    if engine.num_processes == 1:
        return yes
    return bool(engine.reduce(torch.tensor(float(yes), device=engine.device), "sum").item() == engine.num_processes)


def most_of_ranks(numbers: dict[str, int], engine: Engine) -> dict[str, int]:
    """The largest value of each number over the ranks; the same on each."""
    from accelerate.utils import gather

    own = torch.tensor([[*numbers.values()]], device=engine.device)  # [1, numbers]
    return dict(zip(numbers, gather(own).amax(0).tolist(), strict=True))


def free_memory() -> None:
    """Give what the accelerator's allocator keeps for later back to the device."""
    if torch.accelerator.is_available():
        gc.collect()
        torch.accelerator.empty_cache()
