"""The schema of a run, and the only place of defaults; strict.py reads Hydra's composed YAML into it.

Each field's sentence gives its unit and meaning. `adapter` and `quantization` carry, beside `method` and `parts`, the
fields of PEFT's or transformers' own config class (fields.py).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("vision", "projector", "cross_attention", "language", "head")


def home() -> Path:
    """The folder that holds `conf/` and `sweeps/`: the checkout, or the installed package."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "conf").is_dir() else package.parents[1]


def one_of(*choices: str, default: str | None = None) -> Any:
    """A field whose value is one of `choices`; the first is the default unless another is named."""
    return field(default=default or choices[0], metadata={"choices": choices})


def number(default: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Any:
    """A number field with bounds: `least` and `most` are allowed values, `above` is not."""
    return field(default=default, metadata={"least": least, "above": above, "most": most})


@dataclass
class ImageConfig:
    min_tokens: int | None = number(None, least=1)
    """Language-model tokens that the smallest image is scaled up to; null leaves the processor's own limit."""
    max_tokens: int | None = number(None, least=1)
    """Language-model tokens that the largest image is scaled down to; null leaves the processor's own limit."""


@dataclass
class ModelConfig:
    name: str = "auto"
    """Shown in logs and reports."""
    path: str | None = None
    """A hub id (`Qwen/Qwen2-VL-7B-Instruct`) or a local folder in the hub's layout."""
    fresh: str | None = None
    """Dotted path of a function `f(folder, seed)` that writes a new, untrained model in the hub's layout; used in
    place of `path`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; a local folder has none."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository carries. Off unless you have read that code."""
    dtype: str = one_of("auto", "fp32", "bf16", "fp16")
    """Type of the weights in memory; `auto`: the compute type where they are frozen, fp32 where they are trained."""
    attention: str = one_of("auto", "sdpa", "eager")
    """Attention implementation of transformers; `auto`: its own choice, sdpa where the family has it."""
    rewrites: str = one_of("auto", "off")
    """On a CPU: compute patch embeddings, quick GELU, bfloat16 attention and LoRA layers in faster, equal forms."""
    save_layout: str = one_of("native", "original")
    """Layout of the whole model that a run saves; `original`: as InternVL2's own code reads it."""
    freeze: list[str] = field(default_factory=list)
    """Parts that don't train in full fine-tuning (adapter=none); under an adapter the whole base is frozen."""
    system_prompt: str | None = None
    """A system turn in front of each conversation; null leaves the chat template's own."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How large images may become in language-model tokens."""


@dataclass
class SchedulerConfig:
    name: str = one_of("cosine", "linear", "constant")
    """Shape of the learning rate after the warmup."""
    warmup_fraction: float = number(0.03, least=0, most=1)
    """Share of all optimizer steps in which the learning rate rises from 0."""


@dataclass
class TrainerConfig:
    epochs: float = number(1.0, above=0)
    """Passes over the training rows."""
    max_steps: int | None = number(None, least=1)
    """Optimizer steps; wins over `epochs`."""
    batch_size: int = number(8, least=1)
    """Rows per forward pass on one process."""
    batch_tokens: int | None = number(None, least=1)
    """Tokens per forward pass on one process, padding counted, in place of `batch_size` rows: rows of near lengths are
    put together, as many as fit."""
    gradient_accumulation_steps: int = number(1, least=1)
    """Forward passes per optimizer step on one process."""
    eval_batch_size: int = number(8, least=1)
    """Rows per forward pass in evaluation and prediction."""
    learning_rate: float = number(2e-4, least=0)
    """Peak learning rate."""
    learning_rate_of: dict[str, float] = field(default_factory=dict)
    """Peak learning rate of single parts, for instance {vision: 2e-6}."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over time."""
    max_grad_norm: float | None = number(1.0, above=0)
    """Gradients are scaled down to this L2 norm; null: never."""
    precision: str = one_of("auto", "fp32", "bf16", "fp16")
    """Type that is computed in; `auto`: bf16 where the accelerator has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    share_prefix: str = one_of("auto", "on", "off")
    """Put an image that several rows ask about into the batch once; `auto`: where an equality check allows it."""
    eval_every: Any = "epoch"
    """Evaluate every N optimizer steps, or `epoch`; null: only before and after."""
    eval_baseline: bool = True
    """Evaluate the untrained model first."""
    save_every: Any = 500
    """Write a checkpoint every N optimizer steps, or `epoch`; null: never. The final model is always saved."""
    keep_checkpoints: int = number(2, least=1)
    """Newest checkpoints to keep; the best one is kept besides."""
    best_metric: str | None = None
    """A metric such as `eval/exact_match` (higher is better) or `eval/loss` (lower is): the model saved at the end is
    that of the checkpoint where it was best."""
    early_stopping_patience: int | None = number(None, least=1)
    """Evaluations without a better `best_metric` after which training stops."""
    nonfinite: str = one_of("stop", "skip")
    """What to do when the loss or the gradient is NaN or infinite: stop, or skip that step (10 in a row stop)."""
    log_every: int = number(10, least=1)
    """Optimizer steps per logged line."""
    num_workers: int | None = number(None, least=0)
    """Processes that prepare batches ahead; null: 4 beside an accelerator, none on a CPU."""
    seed: int = number(0, least=0)
    """Seed of the order of rows, dropout and new weights."""


@dataclass
class ColumnsConfig:
    image: str = "image_path"
    """Column with the path of each row's image, or a list of paths."""
    question: str | None = "question"
    """Column with the question; rows with an empty one are captions. null, or task=caption: all rows are."""
    answer: str = "answer"
    """Column with the answer to learn, or to compare with."""
    conversation: str | None = None
    """Column with whole conversations, in LLaVA's or OpenAI's form; the columns of question and answer are then not
    read."""
    system: str | None = "system"
    """Column with a system prompt of the row's own, in place of model.system_prompt, if there is such a column."""


@dataclass
class DataConfig:
    _target_: str = "vlmtune.data.table.read_files"
    """Function of this config that returns the splits {train, validation, test}; your own goes here."""
    train: Any = field(default=None, metadata={"files": True})
    """File to train on, or a list of files: CSV, TSV, JSON, JSON lines or Parquet, by the ending. `FILE.json:KEY` reads
    the list that stands under a key. With data=hub a folder or an id of a hub."""
    validation: Any = field(default=None, metadata={"files": True})
    """File or files that evaluation uses."""
    validation_fraction: float = number(0.0, least=0, most=0.9)
    """Share of the training images held out for evaluation where no validation file is given."""
    test: Any = field(default=None, metadata={"files": True})
    """File or files that are evaluated once, at the end, and that predict.py and evaluate.py read."""
    header: list[str] | None = None
    """Names of the columns, in order, of a CSV or TSV that has no header line; null: its first line is the header."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Names of the columns in the files."""
    image_root: Any = field(default=None, metadata={"per_split": True})
    """Folder that relative image paths start from, or one per split: {train: FOLDER, test: FOLDER}; null: the folder of
    the file."""
    subset: str | None = None
    """Configuration of a data set on the hub that has several, with data=hub."""
    streaming: bool = False
    """With data=hub: read the training rows in the order of the source while training, for sets that fit on no disk.
    Needs trainer.max_steps, and max_eval_rows where rows are evaluated. Bad rows that are left out are logged."""
    shuffle_buffer: int = number(1000, least=1)
    """Rows from which each streamed row is drawn at random; 1 keeps the order of the source."""
    image_name: str | None = None
    """How the name of an image's file is made of what its cell holds: `{}.jpg`, or `COCO_train2014_{:012d}.jpg` for the
    number of an image; null: the cell is the name."""
    image_separator: str | None = None
    """What stands between the paths of several images in one cell, for instance `;`. A JSON list needs none."""
    answer_lists: str = one_of("references", "text")
    """What a list of texts in an answer is: several references, of which the first is trained on, or the answer itself,
    as JSON."""
    ignore: list[str] = field(default_factory=list)
    """Columns and keys of messages to leave unread on purpose, where a row that holds something there would otherwise
    be refused, for instance [rejected, bbox]."""
    supervise: str = one_of("last", "all")
    """Answers of a conversation that are trained on."""
    on_bad_row: str = one_of("fail", "drop")
    """What to do with rows that can't be used: stop and list them, or leave them out and list them."""
    max_bad_fraction: float = number(0.1, least=0, most=1)
    """With on_bad_row=drop: the share of bad rows above which the run stops all the same."""
    on_duplicate: str = one_of("keep", "drop", "fail")
    """What to do with rows that repeat an earlier one, image, question and answer: train on them as they stand, leave
    the later ones out and list them, or stop and list them. Prediction answers every row."""
    check_images: str = one_of("decode", "header")
    """Before the model loads, decode each image once, or read only its header (for very large sets)."""
    fast_jpeg: bool = True
    """Decode a JPEG that the model sees much smaller at a half, a quarter or an eighth of its size. Pixels then differ
    a little from those of the whole image scaled down."""
    cache_features: str = one_of("auto", "off", "memory", "disk")
    """Keep what a frozen vision tower and projector make of each image: in memory, or on disk as well, where later
    runs find it. `auto`: in memory on a CPU, where images are needed more than once. `memory` and `disk` keep the
    processor's pixels where the tower trains or the model takes no features."""
    cache_gb: float = number(4.0, least=0)
    """Gigabytes of features or pixels in memory, per process; images beyond that are computed each time."""
    cache_folder: str | None = None
    """Folder for cache_features=disk; null: vlmtune in the user's cache folder."""
    max_image_pixels: int = number(100_000_000, least=1)
    """Images with more pixels are refused before they are decoded."""
    max_train_rows: int | None = number(None, least=1)
    """Use at most N training rows, drawn by seed."""
    max_eval_rows: int | None = number(None, least=1)
    """Use at most N rows of validation and of test, the first ones."""


@dataclass
class OptimizerConfig:
    name: str = one_of("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon")
    """AdamW of torch (fused where the device has it), bitsandbytes' 8-bit and paged forms, or torch's Muon on hidden
    matrices with AdamW on embeddings, the head and all else."""
    weight_decay: float = number(0.0, least=0)
    """Decoupled weight decay of matrices; biases, norms and other vectors have none."""
    beta1: float = number(0.9, least=0, most=1)
    """Decay per optimizer step of the mean gradient."""
    beta2: float = number(0.999, least=0, most=1)
    """Decay per optimizer step of the mean squared gradient."""
    eps: float = number(1e-8, above=0)
    """Added to the root of the mean squared gradient before dividing by it."""
    momentum: float = number(0.95, least=0, most=1)
    """Decay per optimizer step of Muon's mean gradient; `adamw` and its forms have beta1 instead."""
    loraplus_lr_ratio: float = number(1.0, least=1)
    """Learning rate of LoRA's B over that of its A: LoRA+ has 16 (Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass
class TaskConfig:
    name: str = "vqa"
    """Shown in logs and reports."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """Names of `vlmtune.metrics` or dotted paths of your own `f(prediction, references) -> float`; the first is the
    objective."""
    caption_prompt: str = "Describe the image."
    """The question that a row without one gets."""


@dataclass
class GenerationConfig:
    max_new_tokens: int = number(256, least=1)
    """Longest answer, in tokens."""
    temperature: float = number(0.0, least=0)
    """0: the most likely token each time; above: sampling."""
    top_p: float = number(1.0, above=0, most=1)
    """Sampling keeps the most likely tokens that together reach this probability."""


@dataclass
class TrackerConfig:
    name: str = one_of("wandb", "tensorboard", "none")
    """Where curves go besides metrics.jsonl."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT, or `vlmtune` without it."""
    mode: str | None = field(default=None, metadata={"choices": ("offline", "online", None)})
    """W&B mode; null: WANDB_MODE, or `offline` without it, which needs no account."""
    samples: int = number(16, least=0)
    """Predictions with images in the table that each evaluation logs."""


@dataclass
class MethodConfig:
    """A method of another package, `adapter` or `quantization`; in YAML its `fields` stand beside the other two."""

    method: str | None = None
    """The name in that package's own registry; null: none."""
    parts: list[str] = field(default_factory=lambda: ["language"])
    """The parts of the model that it goes on."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of that package's own config class, as far as they are set."""


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is fine-tuned."""
    adapter: MethodConfig = field(default_factory=MethodConfig)
    """`method`, a name of PEFT's registry or null for none; `parts` that it goes on; and that PEFT config's fields."""
    quantization: MethodConfig = field(default_factory=MethodConfig)
    """`method`, a name of transformers' registry or null for none; `parts` stored so; and that class's fields."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long, how fast and with what care it trains."""
    data: DataConfig = field(default_factory=DataConfig)
    """The rows."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How a gradient changes the weights."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What counts as a good answer."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How answers are written."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where curves and samples are shown."""
    resume: str | None = None
    """A run folder to resume, from its newest sound checkpoint."""
    preflight: str = one_of("on", "only")
    """`only`: stop after the checks that come before the first step."""

    @property
    def uses_adapter(self) -> bool:
        return self.adapter.method is not None

    @property
    def is_quantized(self) -> bool:
        return self.quantization.method is not None


OPEN_GROUPS = ("adapter", "quantization")
"""Groups whose keys are another package's."""
SCHEMA = {f.name: f for f in dataclasses.fields(Config)}


def nested_schema(spec: dataclasses.Field[Any]) -> type | None:
    """The dataclass of ours that a field holds, if it holds one."""
    found = globals().get(str(spec.type))
    ours = dataclasses.is_dataclass(found) and isinstance(found, type) and found is not MethodConfig
    return found if ours else None


def plain(config: Any) -> dict[str, Any]:
    """A `Config`, or a group of it, in the form of its YAML."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = {name: plain(v) if dataclasses.is_dataclass(v) else copy.deepcopy(v) for name, v in values.items()}
    if isinstance(config, MethodConfig):
        found |= found.pop("fields")
    return found


def defaults() -> dict[str, Any]:
    """Every key with the value that it has where no YAML file and no override sets it."""
    return plain(Config())
