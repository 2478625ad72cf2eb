"""What a run needs of the machine it is on: processes, devices, number types, one folder, signals."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from vlmtune import display
from vlmtune.config.schema import AUTO, Config, TrainerConfig
from vlmtune.errors import ConfigError, VlmtuneError
from vlmtune.launch import ranks, steps, surroundings, tf32
from vlmtune.launch.engine import Engine
from vlmtune.launch.world import World
from vlmtune.packages import import_bitsandbytes

log = logging.getLogger("vlmtune")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other. The first one saves alone: 100 GB at 50 MB/s, written, read back and hashed,
take 100 minutes, and NCCL's own limit is 10. The launcher notices a process that dies at once, so only one that hangs
is waited for.
"""


def engine(config: Config, *, trains: bool = True) -> Engine:
    """The Accelerator: devices and processes as launched, `trainer.precision`, and all seeds set.

    `trains`: whether it is for training; else for answering. Raises ConfigError where the device can't compute in the
    asked precision, there are more processes than GPUs, or bitsandbytes is needed and can't be imported.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, set_seed

    quiet_libraries()
    tf32.use(False)  # until training begins
    forget_precision()
    # a tower, or a module trained beside an adapter, gets no gradient from rows without images
    beside = config.adapter.parts != ["language"] or bool(config.adapter.fields.get("modules_to_save"))
    unused = not config.uses_adapter or beside
    with surroundings.without_accelerate_settings() as hidden:
        on_cpu = not torch.cuda.is_available()  # or a launcher's CPU ranks would each believe to be alone
        device = join(config, on_cpu=on_cpu)  # first: a question to CUDA would open GPU 0
        mixed = mixed_precision(config, device)
        surroundings.log_ignored(
            hidden, {"ACCELERATE_MIXED_PRECISION": mixed, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
        )
        set_seed(config.trainer.seed)
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed,
            gradient_accumulation_plugin=GradientAccumulationPlugin(  # the loop accumulates by itself
                num_steps=1, sync_with_dataloader=False
            ),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
            ],
        )
    accelerator.sync_gradients = True  # or a loop left half way in this process decides whether a step counts
    if (key := needs_bitsandbytes(config, trains)) is not None:
        import_bitsandbytes(key)
    log_idle_devices(accelerator, trains)
    return accelerator


def exchange(config: Config, world: World, *, on_cpu: bool) -> dict[str, Any]:
    """Options of the process group. Shares of a model that are kept in the CPU's memory are exchanged there."""
    both = config.sharding.cpu_offload and not world.is_alone and not on_cpu
    return {"timeout": TIMEOUT, **({"backend": "cuda:nccl,cpu:gloo"} if both else {})}


def join(config: Config, *, on_cpu: bool) -> torch.device:
    """Join the other processes that the launcher started; returns the device of this one.

    Raises ConfigError where they can't all be there, and the error of one that failed before it came here.
    """
    from accelerate import PartialState

    world = World.from_environment()
    check_devices(world)
    ranks.meet(world)
    state = PartialState(cpu=on_cpu, **exchange(config, world, on_cpu=on_cpu))
    if state.num_processes != world.processes:
        raise ConfigError(
            f"WORLD_SIZE is {world.processes}, and {state.num_processes} processes found each other: LOCAL_RANK is "
            "missing, or an MPI launcher set its own variables. Start them by torchrun --nproc_per_node N, or one "
            "process with backend=accelerate backend.num_processes=N"
        )
    device: torch.device = state.device
    return device


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
    # their deprecations are for us, not for users
    for package in ("transformers", "peft", "bitsandbytes", "torch", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=package)
    if display.console.quiet or not display.console.is_terminal:
        transformers_logging.disable_progress_bar()


def check_devices(world: World) -> None:
    """Raise ConfigError where two processes would share a GPU, which NCCL refuses at their first exchange."""
    devices = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if devices == 1 and shown and "," not in shown:
        return  # a launcher may show each process its own
    if 0 < devices < world.processes_here:
        raise ConfigError(
            f"{world.processes_here} processes on a machine with {devices} usable GPU{'s' * (devices > 1)}: each needs "
            f"its own; start {devices} (backend.num_processes={devices}, or torchrun --nproc_per_node {devices}), or "
            "check CUDA_VISIBLE_DEVICES"
        )


def mixed_precision(config: Config, device: torch.device) -> str:
    """Accelerate's name for `trainer.precision` on `device`. Raises ConfigError where it can't compute so."""
    precision, on_gpu = config.trainer.precision, device.type == "cuda"
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slower than fp32
    if precision == "auto" and on_gpu and not bf16:
        if config.model.dtype == "bf16":
            raise ConfigError("model.dtype=bf16: this GPU has no bfloat16; use auto, fp16 or fp32")
        log.info("computing in fp16: %s has no bfloat16", torch.cuda.get_device_name(device))
        return "fp16"
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("trainer.precision=fp16: needs an accelerator; use fp32 (or bf16) on a CPU")
    if precision == "bf16" and on_gpu and not bf16:
        raise ConfigError("trainer.precision=bf16: this GPU has no bfloat16; use fp16 or fp32")
    return "no" if precision == "fp32" else precision


def needs_bitsandbytes(config: Config, trains: bool) -> str | None:
    """The key, with its value, for which a run needs bitsandbytes; None if it does not.

    A checkpoint that is stored quantized says so itself (`models.quantization.use_stored`).
    """
    method, optimizer = str(config.quantization.method), config.optimizer.name
    if method.startswith("bitsandbytes"):
        return f"quantization.method={method}"
    if trains and (optimizer.endswith("_8bit") or optimizer.startswith("paged_")):
        return f"optimizer.name={optimizer}"
    if trains and config.adapter.fields.get("init_lora_weights") == "loftq":
        return "adapter.init_lora_weights=loftq"
    return None


def log_idle_devices(engine: Engine, trains: bool) -> None:
    """Log the accelerators of this machine that the run leaves alone, and why."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type != "cuda":
        log.info(
            "computing on the CPU: this machine has %s, which vlmtune does not use (only CUDA and ROCm)", found.type
        )
    if trains and engine.num_processes == 1 and torch.cuda.device_count() > 1:
        log.info("computing on one of %d GPUs; backend=accelerate uses all of them", torch.cuda.device_count())


def prepared(model: Any, optimizer: Any, engine: Engine, *, sharded: bool, same_buffers: bool) -> tuple[Any, Any]:
    """Both as the loop takes them: with several ranks, in the wrapper that averages gradients. A `sharded` model
    averages them itself.

    `same_buffers`: whether training leaves the model's buffers as they are; the others are sent from the first rank to
    all at each step, so that a batch norm's averages stay the same.
    """
    engine.ddp_handler.broadcast_buffers = not same_buffers
    wrapped = engine.prepare_model(model, evaluation_mode=sharded)
    optimizer = engine.prepare(optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.device_ids = None  # or it would move what a batch keeps on the CPU, to be read there
    return wrapped, optimizer


def seed_step(seed: int, engine: Engine, step: int) -> None:
    """Have the random numbers from here on follow from seed, steps done and rank: a step's dropout, or the answers that
    an evaluation draws. So a resumed run draws what it would have drawn, and each rank its own.
    """
    words = np.random.SeedSequence([seed, step, engine.process_index]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def use_tf32(trainer: TrainerConfig, engine: Engine) -> None:
    """Compute float32 runs on a GPU in TF32 by `trainer.tf32`, until the run ends. The checks before compare in full
    float32, as TF32's rounding would hide, or look like, a difference.
    """
    in_fp32 = engine.mixed_precision == "no" and engine.device.type == "cuda"
    used = trainer.tf32 and in_fp32 and torch.cuda.is_tf32_supported()
    tf32.use(used)
    if used:
        log.info("float32 products are computed in TF32 (10 bits of precision); trainer.tf32=false: in full")


def dtypes(config: Config, engine: Engine) -> dict[str, torch.dtype]:
    """`compute_dtype`, and the `dtype` of the weights: frozen ones in the compute type, trained ones in fp32."""
    compute = DTYPES.get(engine.mixed_precision, torch.float32)
    if config.model.dtype != "auto":
        return {"dtype": DTYPES[config.model.dtype], "compute_dtype": compute}
    return {"dtype": compute if config.uses_adapter else torch.float32, "compute_dtype": compute}


class Complete(Exception):
    """With `resume=auto`, the first rank found the run complete: there is nothing left to do."""


def agree_on_folder(folder: Path | None, config: Config, engine: Engine) -> Path:
    """The first rank's run folder, on every rank: only that one looks at the folder. All take over what it found there,
    `config.resume` and the step size.

    Raises Complete, on all of them, if it found the run complete.
    """
    from accelerate.utils import broadcast_object_list

    trainer = config.trainer
    steps.fix(config, engine.num_processes)
    agreed: list[Any] = [str(folder), config.resume, trainer.rows_per_step, trainer.passes_per_step]
    if engine.num_processes > 1:
        broadcast_object_list(agreed)
    place, config.resume, trainer.rows_per_step, trainer.passes_per_step = agreed
    if config.resume == AUTO:  # else it is a folder by now, or null
        raise Complete
    return Path(place)


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
    """Give what the GPU's allocator keeps for later back to the device."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
