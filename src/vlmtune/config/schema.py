"""The schema of a run and the only place for defaults; strict.py reads Hydra's composed YAML into it.

Each field's docstring gives its meaning and unit. In addition to `method` and `parts`, `adapter` and `quantization`
take the fields of PEFT's or transformers' config class (fields.py).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.commands import PACKAGE

PARTS = ("vision", "projector", "cross_attention", "language", "head")


def home() -> Path:
    """The folder that contains `conf/` and `sweeps/`: the checkout, or the installed package."""
    return PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1]


def one_of(*choices: str, default: str | None = None) -> Any:
    """A field whose value is one of `choices`; the first is the default unless another is named."""
    return field(default=default or choices[0], metadata={"choices": choices})


def number(default: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Any:
    """A number field with bounds: `least` and `most` are inclusive, `above` is exclusive."""
    return field(default=default, metadata={"least": least, "above": above, "most": most})


READ_FILES = "vlmtune.data.table.read_files"
"""The function that reads tables by their file extensions, as `data._target_`."""
READ_HUB = "vlmtune.data.sources.hub.load"
"""The function that reads data sets of the hub."""
AUTO = "auto"
"""As `resume`: resume or start, depending on the folder."""


@dataclass
class ImageConfig:
    min_tokens: int | None = number(None, least=1)
    """Smaller images are scaled up to this many language-model tokens; null: the processor's own limit."""
    max_tokens: int | None = number(None, least=1)
    """Larger images are scaled down to this many language-model tokens; null: the processor's own limit."""


@dataclass
class ModelConfig:
    name: str = "auto"
    """Shown in logs and reports."""
    path: str | None = None
    """A hub id (`Qwen/Qwen2-VL-7B-Instruct`) or a local folder in the hub's layout."""
    fresh: str | None = None
    """Dotted path of a function `f(folder, seed)` that writes a new, untrained model in the hub's layout; replaces
    `path`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; not used for a local folder."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Figures of the checkpoint's config.json (`model_type`, layers, widths, ...) from which plan.py computes memory
    without a download. A run itself reads the checkpoint's own."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository, and a kernel that model.attention names. Only switch it on for code
    that you have read."""
    dtype: str = one_of("auto", "fp32", "bf16", "fp16")
    """Data type of the weights in memory; `auto`: fp32 for trained weights, the compute type for frozen ones."""
    attention: str = "auto"
    """Attention implementation, by its name in transformers: `sdpa`, `eager`, `flash_attention_2`, `flex_attention`,
    ..., or a kernel of the hub, `OWNER/NAME@COMMIT`, which is compiled code and needs model.trust_remote_code. `auto`:
    transformers' default, sdpa if the family supports it. A check at the start compares others with sdpa."""
    rewrites: str = one_of("auto", "on", "off")
    """Use faster, equivalent forms of modules. `auto`: of patch embedding everywhere; of quick GELU, bfloat16 attention
    and LoRA layers on a CPU, where they were measured. `on`: of quick GELU and LoRA layers on accelerators too, where
    they need less memory."""
    save_layout: str = one_of("native", "original")
    """File layout of a saved full model; `original`: the layout that InternVL2's own code reads."""
    freeze: list[str] = field(default_factory=list)
    """Parts to freeze in full fine-tuning (adapter=none); with an adapter the whole base model is frozen."""
    system_prompt: str | None = None
    """System prompt for each conversation; null: the chat template's own."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Bounds on the size of images, in language-model tokens."""


@dataclass
class SchedulerConfig:
    name: str = one_of("cosine", "linear", "constant")
    """Learning rate schedule after the warmup."""
    warmup_fraction: float = number(0.03, least=0, most=1)
    """Fraction of all optimizer steps during which the learning rate rises from 0. A run keeps its warmup if it is
    resumed with more steps."""


@dataclass
class TrainerConfig:
    epochs: float = number(1.0, above=0)
    """Number of passes over the training rows."""
    max_steps: int | None = number(None, least=1)
    """Number of optimizer steps; overrides `epochs`."""
    batch_size: int = number(8, least=1)
    """Rows per forward pass on each process."""
    batch_tokens: int | None = number(None, least=1)
    """Maximum tokens per forward pass on each process, including padding; replaces `batch_size`. Rows of similar length
    are batched together, as many as fit."""
    auto_micro_batch: bool = False
    """Halve the forward passes of a step for as long as one does not fit into memory: the rows of a step stay the same,
    and so does the result up to rounding. Evaluation too takes fewer rows at a time. With several processes, only the
    check at the start and evaluations can do so."""
    gradient_accumulation_steps: int = number(1, least=1)
    """Forward passes per optimizer step on each process, when a run first starts."""
    rows_per_step: int | None = number(None, least=1)
    """Rows per optimizer step, shared by all processes, which compute them in forward passes of at most `batch_size`;
    overrides `gradient_accumulation_steps`. null: `batch_size` x `gradient_accumulation_steps` x processes when the run
    first starts. It belongs to the run from then on, whatever the number of processes."""
    passes_per_step: int | None = number(None, least=1)
    """The same with `batch_tokens`: forward passes per optimizer step, shared by all processes. null:
    `gradient_accumulation_steps` x processes when the run first starts."""
    eval_batch_size: int = number(8, least=1)
    """Rows per forward pass in evaluation and prediction."""
    learning_rate: float = number(2e-4, least=0)
    """Peak learning rate."""
    learning_rate_of: dict[str, float] = field(default_factory=dict)
    """Peak learning rate per part, for instance {vision: 2e-6}; other parts use `learning_rate`."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over time."""
    max_grad_norm: float | None = number(1.0, above=0)
    """Gradients are clipped to this L2 norm; null: no clipping."""
    precision: str = one_of("auto", "fp32", "bf16", "fp16")
    """Data type for computing; `auto`: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    tf32: bool = True
    """With precision=fp32 on a GPU that has TF32: train in it. Products are faster, and read 10 bits of each factor's
    23. The checks at the start, and prediction, always compute in full."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and about a third more time."""
    share_prefix: str = one_of("auto", "on", "off")
    """Compute an image that several rows of a batch ask about only once; `auto`: if a check at the start finds equal
    loss and gradients."""
    eval_every: Any = "epoch"
    """Evaluate every N optimizer steps, or every `epoch`; null: only before and after training."""
    eval_baseline: bool = True
    """Evaluate the model before training."""
    save_every: Any = 500
    """Write a checkpoint every N optimizer steps, or every `epoch`; null: never. The final model is always saved. A
    checkpoint is copied to main memory and written while training goes on; the copy takes 12 bytes per trained weight
    with AdamW in fp32, 4 with bf16 weights and adamw_8bit."""
    keep_checkpoints: int = number(2, least=1)
    """Number of newest checkpoints to keep; the best one is kept as well."""
    best_metric: str | None = None
    """A metric such as `eval/exact_match` (higher is better), or `eval/loss` or `eval/cer` (lower is better): the model
    saved at the end is the one from the checkpoint where it was best."""
    early_stopping_patience: int | None = number(None, least=1)
    """Stop training after this many evaluations in a row without a better `best_metric`; null: never."""
    nonfinite: str = one_of("stop", "skip")
    """What to do if the loss or the gradient is NaN or infinite: stop, or skip the step (10 in a row still stop)."""
    log_every: int = number(10, least=1)
    """Log every N optimizer steps."""
    num_workers: int | None = number(None, least=0)
    """Number of worker processes that prepare batches in advance; null: 4 with an accelerator, 0 on a CPU. Fewer if
    their batches don't fit into half of the free shared memory (/dev/shm)."""
    seed: int = number(0, least=0)
    """Random seed for the order of rows, dropout and new weights."""


@dataclass
class ColumnsConfig:
    image: str = "image_path"
    """Column with the image path of each row, or a list of paths."""
    question: str | None = "question"
    """Column with the question; rows with an empty one are captions. null, or task=caption: all rows are captions."""
    answer: str = "answer"
    """Column with the answer: the training target, or the reference in an evaluation."""
    conversation: str | None = None
    """Column with whole conversations, in LLaVA's or OpenAI's format; replaces the question and answer columns."""
    system: str | None = "system"
    """Column with a system prompt per row, which replaces model.system_prompt, if the table has such a column."""


@dataclass
class DataConfig:
    _target_: str = READ_FILES
    """Dotted path of the function that gets this config and returns the splits {train, validation, test}; may be your
    own."""
    train: Any = field(default=None, metadata={"files": True})
    """Training file, or a list of files: CSV, TSV, JSON, JSON lines or Parquet, by file extension. `FILE.json:KEY`
    reads the list at a key. With data=hub: a folder or a hub id."""
    validation: Any = field(default=None, metadata={"files": True})
    """File or files for evaluation."""
    validation_fraction: float = number(0.0, least=0, most=0.9)
    """Fraction of the training images held out for evaluation if no validation file is set."""
    test: Any = field(default=None, metadata={"files": True})
    """File or files for the evaluation at the end, and for predict.py and evaluate.py."""
    header: list[str] | None = None
    """Column names, in order, of a CSV or TSV without a header line; null: the first line is the header."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """The column names in the files."""
    image_root: Any = field(default=None, metadata={"per_split": True})
    """Folder that relative image paths start from, or one per split: {train: FOLDER, test: FOLDER}; null: the folder of
    each file."""
    subset: str | None = None
    """With data=hub: the configuration of a data set that has several."""
    streaming: bool = False
    """With data=hub: read the training rows from the source during training, for sets that are too large for the disk.
    Needs trainer.max_steps, and max_eval_rows if there is an evaluation. Skipped bad rows are logged."""
    shuffle_buffer: int = number(1000, least=1)
    """Number of rows from which each streamed row is drawn at random; 1: the order of the source."""
    image_name: str | None = None
    """Pattern that turns an image cell into a file name: `{}.jpg`, or `COCO_train2014_{:012d}.jpg` for image numbers;
    null: the cell is the file name."""
    image_separator: str | None = None
    """Separator between the paths of several images in one cell, for instance `;`. Not needed for a JSON list."""
    answer_lists: str = one_of("references", "text")
    """How to read a list of texts in an answer cell: as several references, the first of which is trained on, or as the
    answer itself, in JSON."""
    ignore: list[str] = field(default_factory=list)
    """Columns and message keys to ignore, for instance [rejected, bbox]. Rows with a value in them are refused
    otherwise."""
    supervise: str = one_of("last", "all")
    """Which answers of a conversation are trained on."""
    on_bad_row: str = one_of("fail", "drop")
    """What to do with rows that can't be used: stop and list them, or skip and list them."""
    max_bad_fraction: float = number(0.1, least=0, most=1)
    """With on_bad_row=drop: the run still stops above this fraction of bad rows."""
    on_duplicate: str = one_of("keep", "drop", "fail")
    """What to do with rows that repeat the image, question and answer of an earlier row: train on them too, skip and
    list them, or stop and list them. Prediction always answers every row."""
    check_images: str = one_of("decode", "header")
    """Check of each image before the model loads: decode it, or only read its header (for very large sets)."""
    fast_jpeg: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size if the model sees it much smaller anyway. Pixels differ slightly
    from those of the full-size image scaled down."""
    cache_features: str = one_of("auto", "off", "memory", "disk")
    """Cache the features that a frozen vision tower and projector compute for each image: in memory, or also on disk
    for later runs. `auto`: on a CPU, if images are needed more than once, in memory and in `cache_folder` if it is set;
    the trials of a sweep share one. If the tower trains or the model takes no features, `memory` and `disk` cache the
    processor's pixels instead."""
    cache_gb: float = number(4.0, least=0)
    """Size limit of the cache in memory, in gigabytes per process; further images are computed each time."""
    cache_folder: str | None = None
    """Folder of the cache on disk; null: for cache_features=disk `vlmtune` in the user's cache folder, for the trials
    of a sweep one in the sweep's folder."""
    max_image_pixels: int = number(100_000_000, least=1)
    """Images with more pixels (width x height) are refused before they are decoded."""
    max_train_rows: int | None = number(None, least=1)
    """Use at most N training rows, drawn at random by seed."""
    max_eval_rows: int | None = number(None, least=1)
    """Use at most the first N rows of validation and of test."""

    @property
    def caches_on_disk(self) -> bool:
        """Whether what is cached of images is kept on disk too, for other runs."""
        return self.cache_features == "disk" or (self.cache_features == "auto" and self.cache_folder is not None)


@dataclass
class OptimizerConfig:
    name: str = one_of("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon")
    """torch's AdamW (fused if the device supports it), bitsandbytes' 8-bit and paged variants, or torch's Muon for
    hidden matrices with AdamW for embeddings, the head and everything else."""
    weight_decay: float = number(0.0, least=0)
    """Decoupled weight decay for matrices; biases, norms and other vectors have none."""
    beta1: float = number(0.9, least=0, most=1)
    """AdamW's decay rate of the gradient average, per optimizer step."""
    beta2: float = number(0.999, least=0, most=1)
    """AdamW's decay rate of the squared gradient average, per optimizer step."""
    eps: float = number(1e-8, above=0)
    """AdamW's term for numerical stability, added to the denominator."""
    momentum: float = number(0.95, least=0, most=1)
    """Muon's momentum, per optimizer step; AdamW variants use beta1."""
    rounding: str = one_of("stochastic", "nearest")
    """How bf16 weights are rounded after a step: up or down at random, so that small steps count on average, or to the
    nearest value, which loses them. Weights in fp32 are not rounded."""
    offload: bool = False
    """Keep AdamW's state in the CPU's memory and update the weights there: frees 8 bytes per trained weight on the
    accelerator, and a step takes longer."""
    step_in_backward: bool = False
    """Update each weight in the backward pass as soon as its gradient is known, and free the gradient: frees the memory
    of all gradients. Needs trainer.max_grad_norm=null, one process and no gradient accumulation."""
    loraplus_lr_ratio: float = number(1.0, least=1)
    """Ratio of the learning rate of LoRA's B to that of its A; LoRA+ uses 16 (Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass
class TaskConfig:
    name: str = "vqa"
    """Shown in logs and reports."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """Metrics of `vlmtune.metrics`, or dotted paths of your own functions `f(prediction, references) -> float`; the
    first is the run's objective."""
    slices: list[str] = field(default_factory=list)
    """Columns of the table: evaluations also show the metrics for each of their values. Without a column of that name,
    `answer_length`, `question_kind` (its first two words) and `image_size` (megapixels) are known too."""
    caption_prompt: str = "Describe the image."
    """The question for rows without one."""


@dataclass
class GenerationConfig:
    max_new_tokens: int = number(256, least=1)
    """Maximum length of an answer, in tokens."""
    temperature: float = number(0.0, least=0)
    """0: greedy, always the most likely token; above 0: sampling."""
    top_p: float = number(1.0, above=0, most=1)
    """Sample from the most likely tokens whose probabilities add up to this value."""
    merge_adapter: str = one_of("auto", "on", "off")
    """When a finished run answers: add the adapter to the base model's weights in memory, which is faster. `auto`: if
    these weights are in fp32; `on`: also in bf16 and fp16, which rounds the sums; quantized weights never."""


@dataclass
class TrackerConfig:
    name: str = one_of("wandb", "tensorboard", "none")
    """Where metrics are sent, in addition to metrics.jsonl."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT if set, else `vlmtune`."""
    mode: str | None = field(default=None, metadata={"choices": ("offline", "online", None)})
    """W&B mode; null: WANDB_MODE if set, else `offline`, which needs no account."""
    samples: int = number(16, least=0)
    """Number of predictions with images in the table that each evaluation logs."""


@dataclass
class BackendConfig:
    name: str = one_of("local", "accelerate", "ray")
    """`local`: this process, or those that torchrun or `accelerate launch` started. `accelerate`: start processes.
    `ray`: start workers on a Ray cluster, and start them again where one is lost."""
    num_processes: int | None = number(None, least=1)
    """With backend=accelerate: processes on this machine; null: one per GPU."""
    num_workers: Any = field(default=None, metadata={"values": "int, [int, int] or null"})
    """With backend=ray, as all keys below: number of workers, or [least, most]: as many as the cluster has room for,
    which may change during the run. Without trainer.rows_per_step, a step has the rows of the most workers."""
    use_gpu: bool = False
    """Each worker gets a GPU; else none is used."""
    resources_per_worker: dict[str, float] = field(default_factory=dict, metadata={"values": "{resource: float}"})
    """What each worker reserves, by Ray's names, for instance {CPU: 4, GPU: 1}; empty: one GPU with `use_gpu`, else one
    CPU."""
    address: str | None = None
    """Address of a Ray cluster, `auto` for the one of this machine; null: a Ray of this machine for this run alone. A
    Python program that has called ray.init stays on that one."""
    storage: str | None = None
    """Folder or URI for Ray's own files about the run, which stay there; null: in the run folder until the end."""
    max_failures: int = number(3, least=-1)
    """How often the run goes on from its last checkpoint after a worker was lost; -1: always. A user's mistake ends it
    at once."""
    max_preemptions: int = number(-1, least=-1)
    """As `max_failures`, for workers whose machine was taken away by the cluster (a spot instance)."""


@dataclass
class ShardingConfig:
    name: str = one_of("none", "fsdp")
    """`none`: each process has the whole model. `fsdp`: each keeps a share of all weights, gradients and the
    optimizer's state, and gathers one block of layers at a time (torch's FSDP2). One process alone trains as with
    `none`."""
    cpu_offload: bool = False
    """Keep the shares in the CPU's memory and take the optimizer's steps there: frees the device's memory, and a step
    takes longer."""
    reshard_after_forward: bool = True
    """Free a gathered block after its forward pass and gather it again in the backward pass: needs less memory and a
    third more communication."""


@dataclass
class MethodConfig:
    """A method of another package: `adapter` or `quantization`. In YAML its `fields` are on the same level as the
    others."""

    method: str | None = None
    """The method's name in that package's registry; null: none."""
    parts: list[str] = field(default_factory=lambda: ["language"])
    """The parts of the model that it applies to."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The fields of that package's config class that are set."""


@dataclass
class AdapterConfig(MethodConfig):
    from_: str | None = None
    """A run, or a folder that PEFT wrote, whose adapter this run starts from, with its method, parts and fields; other
    values are refused, except a dropout."""


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to fine-tune."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """`method`, a name in PEFT's registry or null for none; `parts` that it applies to; `from`, an adapter to start
    from; and the fields of its PEFT config."""
    quantization: MethodConfig = field(default_factory=MethodConfig)
    """`method`, a name in transformers' registry or null for none; `parts` to quantize; and the fields of its config
    class."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Training length, batch sizes, learning rate, evaluation and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """The rows."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its settings."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The task and its metrics."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How answers are generated."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracking: metrics and samples."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    """The processes of the run."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """What each process keeps of the model."""
    resume: str | None = None
    """A run folder to resume from its newest undamaged checkpoint. `auto`: resume the run in hydra.run.dir if it has a
    checkpoint, else start it there; for launchers that start the same command again."""
    preflight: str = one_of("on", "only")
    """`only`: stop after the checks before the first step."""

    @property
    def resumed_folder(self) -> str | None:
        """The folder that `resume` names; None if it names none, or if it is open until the run folder is looked at."""
        return None if self.resume == AUTO else self.resume

    @property
    def uses_adapter(self) -> bool:
        return self.adapter.method is not None

    @property
    def is_quantized(self) -> bool:
        return self.quantization.method is not None

    @property
    def saves_memory(self) -> set[str]:
        """Keys of `memory.SAVERS` that save all they can, or have no effect in this run."""
        trainer = self.trainer
        no_state = self.uses_adapter or self.optimizer.name != "adamw" or self.optimizer.offload  # none worth saving
        one_row = trainer.batch_size == 1 and trainer.batch_tokens is None
        spent = {
            "trainer.auto_micro_batch": trainer.auto_micro_batch or (one_row and trainer.eval_batch_size == 1),
            "trainer.batch_size": trainer.batch_size == 1 or trainer.batch_tokens is not None,
            "trainer.batch_tokens": trainer.batch_tokens is None,
            "trainer.eval_batch_size": trainer.eval_batch_size == 1,
            "trainer.num_workers": trainer.num_workers == 0,
            "trainer.gradient_checkpointing": trainer.gradient_checkpointing,
            "data.cache_features": self.data.cache_features == "off",
            "optimizer.name": no_state,
            "optimizer.offload": no_state,
            "adapter": self.uses_adapter,
            "quantization": self.is_quantized,
        }
        return {key for key, done in spent.items() if done}


OPEN_GROUPS = ("adapter", "quantization")
"""Groups whose keys belong to another package."""
SCHEMA = {f.name: f for f in dataclasses.fields(Config)}


def nested_schema(spec: dataclasses.Field[Any]) -> type | None:
    """The config dataclass of a field, if it has one."""
    found = globals().get(str(spec.type))
    ours = dataclasses.is_dataclass(found) and isinstance(found, type) and not issubclass(found, MethodConfig)
    return found if ours else None


def plain(config: Any) -> dict[str, Any]:
    """A `Config`, or one of its groups, as plain values for YAML."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = {name: plain(v) if dataclasses.is_dataclass(v) else copy.deepcopy(v) for name, v in values.items()}
    if isinstance(config, MethodConfig):
        found |= found.pop("fields")
    if isinstance(config, AdapterConfig):
        found["from"] = found.pop("from_")
    return found


def defaults() -> dict[str, Any]:
    """Every key with its default, before YAML files and overrides."""
    return plain(Config())
