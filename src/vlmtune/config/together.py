"""Problems of keys that are valid alone but not in combination, per group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlmtune.config import fields as known_fields
from vlmtune.config import peft_fields, quantization_fields
from vlmtune.config.schema import PARTS, READ_FILES, READ_HUB, BackendConfig, Config, ModelConfig, ShardingConfig
from vlmtune.errors import ConfigError, nearest
from vlmtune.metrics import resolve


def combinations(config: Config) -> list[str]:
    """All problems of `config`, whose values already have the right types and bounds."""
    groups = (
        *(of_model, of_trainer, of_data, of_stream, of_optimizer, of_task),
        *(of_adapter, of_quantization, of_backend, of_sharding),
    )
    return [problem for group in groups for problem in group(config)]


def of_model(config: Config) -> Iterator[str]:
    model, image = config.model, config.model.image
    if model.path is None and model.fresh is None:
        yield "model.path: missing; give a hub id or a folder, or choose a model by name (model=qwen2vl_7b)"
    if model.trust_remote_code and not Path(str(model.path)).expanduser().is_dir() and not is_commit(model.revision):
        yield (
            f"model.revision={model.revision}: code from a repository only runs at a pinned commit; give the 40 "
            "characters of a commit that you have read"
        )
    yield from _attention(model)
    yield from _no_part("model.freeze", model.freeze)
    if model.dtype == "fp16" and not config.uses_adapter:
        yield f"model.dtype=fp16: {NO_FP16_WEIGHTS}"
    if config.uses_adapter and model.save_layout == "original":
        yield "model.save_layout=original: is for whole models (adapter=none); an adapter has no such layout"
    if config.uses_adapter and model.freeze:
        yield (
            f"model.freeze={model.freeze}: with an adapter the whole base model is frozen already; "
            "remove model.freeze, or use adapter=none"
        )
    if image.min_tokens and image.max_tokens and image.min_tokens > image.max_tokens:
        yield f"model.image.min_tokens={image.min_tokens}: above model.image.max_tokens={image.max_tokens}"


NO_FP16_WEIGHTS = (
    "weights in fp16 can't be trained, since their gradients leave its range; use fp32 (trainer.precision=fp16 still "
    "computes in fp16), or bf16"
)
"""Why fp16 weights are not trained."""


def of_trainer(config: Config) -> Iterator[str]:
    trainer = config.trainer
    for key in ("eval_every", "save_every"):
        value = getattr(trainer, key)
        if not (value in (None, "epoch") or (type(value) is int and value > 0)):
            yield f"trainer.{key}={value}: must be a number of steps, `epoch` or null"
    yield from _no_part("trainer.learning_rate_of", trainer.learning_rate_of)
    if trainer.early_stopping_patience and not (trainer.best_metric and trainer.eval_every):
        yield "trainer.early_stopping_patience: also needs trainer.best_metric and trainer.eval_every"
    if trainer.best_metric:
        name = trainer.best_metric.removeprefix("eval/")
        metrics = ["loss", *config.task.metrics]
        if name not in metrics:
            yield f"trainer.best_metric={trainer.best_metric}: {nearest(name, [f'eval/{m}' for m in metrics])}"
        if not trainer.eval_every:
            yield "trainer.best_metric: also needs trainer.eval_every, or there are no checkpoints to choose from"
    if trainer.share_prefix == "on" and config.model.attention.startswith("flash_attention"):
        yield f"trainer.share_prefix=on: {config.model.attention} only knows padding, and no mask of branches; use auto"
    if trainer.rows_per_step and trainer.batch_tokens:
        yield "trainer.rows_per_step: the rows of a step vary with trainer.batch_tokens; set trainer.passes_per_step"
    if trainer.passes_per_step and not trainer.batch_tokens:
        yield "trainer.passes_per_step: is for trainer.batch_tokens; set trainer.rows_per_step"
    if trainer.precision == "fp16" and config.model.dtype == "bf16":
        yield "trainer.precision=fp16: can't be combined with model.dtype=bf16; use precision=bf16 or dtype=auto"


def of_data(config: Config) -> Iterator[str]:
    data = config.data
    for role, name in vars(data.columns).items():
        if name in data.ignore:
            yield f"data.ignore: {name} is the column that data.columns.{role} reads; remove it from one of them"
    if (data.streaming or data.subset) and data._target_ != READ_HUB:
        yield "data.streaming, data.subset: are for data=hub"
    if data.header is None:
        return
    if data._target_ != READ_FILES:
        yield "data.header: is for CSV and TSV files, with data=csv"
    if not data.header or len(set(data.header)) < len(data.header):
        yield f"data.header={data.header}: must name each column once, for instance [image_path,question,answer]"


def of_stream(config: Config) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    if not data.streaming:
        return
    if data.on_duplicate != "keep":
        yield "data.on_duplicate: repeated rows of a stream can't be detected; leave it out"
    if trainer.share_prefix == "on":
        yield "trainer.share_prefix=on: rows of a stream can't be grouped by their images; use auto"
    if "epoch" in (trainer.save_every, trainer.eval_every if data.validation else None):
        yield "data.streaming: a stream has no epochs; set trainer.eval_every and save_every to steps or null"
    if trainer.max_steps is None:
        yield "data.streaming: a stream has no end; set trainer.max_steps"
    if data.validation_fraction:
        yield "data.validation_fraction: nothing can be held out of a stream; set data.validation"
    if (data.validation or data.test) and data.max_eval_rows is None:
        yield "data.max_eval_rows: missing; data.streaming needs it to limit the rows that are evaluated"


def of_optimizer(config: Config) -> Iterator[str]:
    if config.optimizer.loraplus_lr_ratio != 1 and config.adapter.method not in ("lora", "adalora"):
        yield "optimizer.loraplus_lr_ratio: is for LoRA's B matrices; use adapter=lora or one of its variants"
    if config.optimizer.offload and config.optimizer.name != "adamw":
        yield f"optimizer.offload: {NO_OFFLOAD[config.optimizer.name]}; use optimizer=adamw"
    if config.optimizer.step_in_backward:
        yield from (f"optimizer.step_in_backward: {problem}" for problem in _of_step_in_backward(config))


NO_OFFLOAD = {
    "adamw_8bit": "bitsandbytes has no 8-bit step for a CPU that is fast enough",
    "paged_adamw": "the state of a paged optimizer moves to the CPU by itself when the GPU is full",
    "paged_adamw_8bit": "the state of a paged optimizer moves to the CPU by itself when the GPU is full",
    "muon": "its matrix products would take minutes on a CPU",
}
"""Why an optimizer's state can't be offloaded."""
NO_SCALER = "a step in fp16 may have to be left out, which is known at its end; use trainer.precision=bf16 or fp32"
"""Why fp16's gradient scaler and a step in the backward pass don't go together."""


def _of_step_in_backward(config: Config) -> Iterator[str]:
    trainer = config.trainer
    if trainer.max_grad_norm is not None:
        yield "the norm of all gradients is known at the end, too late for clipping; set trainer.max_grad_norm=null"
    several = trainer.gradient_accumulation_steps > 1 or (trainer.passes_per_step or 1) > 1
    if several or (trainer.rows_per_step or 1) > trainer.batch_size:
        yield (
            "a gradient is complete after one forward pass; set trainer.gradient_accumulation_steps=1, and leave out "
            "trainer.rows_per_step and passes_per_step"
        )
    if trainer.nonfinite == "skip":
        yield "that a step is not finite is known at its end, too late to skip it; set trainer.nonfinite=stop"
    if trainer.precision == "fp16":
        yield NO_SCALER
    if config.adapter.method == "adalora":
        yield "AdaLoRA ranks its directions by the gradients of the whole step; use another adapter"


def of_task(config: Config) -> Iterator[str]:
    if not config.task.metrics:
        yield "task.metrics: is empty; give at least one, for instance task.metrics=[exact_match]"
    try:
        resolve(config.task.metrics)
    except ConfigError as error:
        yield from error.problems


def of_adapter(config: Config) -> Iterator[str]:
    yield from _no_part("adapter.parts", config.adapter.parts)
    if config.resume and config.adapter.method == "adalora":
        yield "resume: not supported with AdaLoRA, which does not save part of its state"
    if config.adapter.from_ and config.adapter.method == "adalora":
        yield "adapter.from: not supported with AdaLoRA, whose ranks are final when its run ends"
    if config.uses_adapter:
        bits = {"bitsandbytes_4bit": 4, None: None}.get(config.quantization.method, 8)
        yield from peft_fields.problems(config.adapter, bits=bits)


def of_quantization(config: Config) -> Iterator[str]:
    yield from _no_part("quantization.parts", config.quantization.parts)
    if not config.is_quantized:
        return
    if not config.uses_adapter:
        yield "quantization: quantized weights can't be trained; add an adapter, for instance adapter=lora"
    yield from quantization_fields.problems(config.quantization)


OF_BACKEND = {
    "accelerate": ("num_processes",),
    "ray": ("num_workers", "use_gpu", "resources_per_worker", "address", "storage", "max_failures", "max_preemptions"),
}
"""The keys that only one backend reads."""


def of_backend(config: Config) -> Iterator[str]:
    backend, default = config.backend, BackendConfig()
    for owner, keys in OF_BACKEND.items():
        for key in keys if owner != backend.name else ():
            value, unset = getattr(backend, key), getattr(default, key)
            if value != unset:
                yield f"backend.{key}={value}: is for backend={owner}; leave it out"
    if backend.name == "ray":
        yield from _of_ray(config)


def _of_ray(config: Config) -> Iterator[str]:
    backend = config.backend
    count, reserved = backend.num_workers, backend.resources_per_worker
    if not _is_count(count):
        yield "backend.num_workers: must be the number of workers, or the least and the most of them: [1,4]"
    if bool(reserved.get("GPU", backend.use_gpu)) != backend.use_gpu:
        yield f"backend.resources_per_worker: GPU is {reserved['GPU']:g} with backend.use_gpu={backend.use_gpu}"
    if config.adapter.method == "adalora":
        yield "backend=ray: its workers resume where one is lost, and AdaLoRA can't; use backend=accelerate"
    yield from (f"backend.resources_per_worker: {name} is below 0" for name, each in reserved.items() if each < 0)


def _is_count(count: Any) -> bool:
    """Whether it is a number of workers, or a range of them."""
    numbers = count if isinstance(count, list) and len(count) == 2 else [count]
    return all(type(number) is int and number > 0 for number in numbers) and numbers[0] <= numbers[-1]


NO_SHARDED_SCALER = (
    "fp16 would leave a step out on one process and not on the others; use trainer.precision=bf16 or fp32"
)
"""Why fp16's gradient scaler and a sharded model don't go together."""


def of_sharding(config: Config) -> Iterator[str]:
    sharding, optimizer = config.sharding, config.optimizer
    if sharding.name == "none":
        usual = vars(ShardingConfig())
        yield from (f"sharding.{key}: is for sharding=fsdp" for key, v in vars(sharding).items() if v != usual[key])
        return
    if config.trainer.precision == "fp16":
        yield f"sharding=fsdp: {NO_SHARDED_SCALER}"
    if config.adapter.method == "adalora":
        yield "sharding=fsdp: AdaLoRA ranks its directions by whole gradients; use another adapter"
    if optimizer.name not in ("adamw", "muon"):
        yield f"optimizer.name={optimizer.name}: takes whole tensors; with sharding=fsdp use adamw, which needs a share"
    if optimizer.offload:
        yield "optimizer.offload: with sharding=fsdp use sharding.cpu_offload=true"
    if sharding.cpu_offload and config.backend.name == "ray" and config.backend.use_gpu:
        yield "sharding.cpu_offload: Ray's workers exchange on their GPUs alone; use backend=accelerate"
    if sharding.cpu_offload and optimizer.name == "muon":
        yield f"sharding.cpu_offload: {NO_OFFLOAD['muon']}; use optimizer=adamw"
    method, storage = config.quantization.method, str(config.quantization.fields.get("bnb_4bit_quant_storage"))
    if method not in (None, "bitsandbytes_4bit"):
        yield f"sharding=fsdp: the weights of {method} are integers, which can't be sharded; use quantization=nf4"
    elif "int" in storage:
        yield f"quantization.bnb_4bit_quant_storage={storage}: integers can't be sharded; leave it out"


def _attention(model: ModelConfig) -> Iterator[str]:
    name = model.attention
    if name == "auto":
        return
    if "/" not in name:
        known = ["auto", *known_fields.methods("attention", name, ())]
        if name not in known:
            yield f"model.attention={name}: {nearest(name, known)}"
        return
    if not re.fullmatch(r"[^/:@]+/[^/:@]+@[0-9a-f]{40}(:[^/:@]+)?", name):
        yield (
            f"model.attention={name}: code from a repository only runs at a pinned commit; give OWNER/NAME@COMMIT with "
            "the 40 characters of a commit that you trust"
        )
    if not model.trust_remote_code:
        yield f"model.attention={name}: is compiled code from the hub; to run it, set model.trust_remote_code=true"


def is_commit(revision: str | None) -> bool:
    """True for a full commit hash: a branch or a tag may point to different code tomorrow."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def _no_part(key: str, names: Iterable[Any]) -> Iterator[str]:
    for name in names:
        if name not in PARTS:
            yield f"{key}: {name} is not a part; {nearest(str(name), PARTS)}"
