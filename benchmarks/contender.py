"""One contender does the work once and prints its figures as JSON: `python benchmarks/contender.py trainer FOLDER ...`.

`trainer` is transformers' own Trainer with PEFT, written as its documentation shows; `trl` is SFTTrainer; `vlmtune` is
`vlmtune.train` with evaluation and trackers off. All train the same rows in the same types: LoRA with r=16 on the
language model over a frozen vision tower, or every weight.

`everything` is vlmtune with W&B (offline), curves logged as by default (every ten steps) and checkpoints; `bare` is a
loop of ten lines over the same batches, model and optimizer. The two tell what the harness around the steps costs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from meter import Watch

WARM_UP = 5
"""Steps that are not counted."""
TARGETS = {
    "linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Of each decoder layer: all linear layers, or those of the attention."""
LEARNING_RATE = 2e-4
PLAIN = {
    "accumulation": 1,
    "checkpointing": False,
    "evaluated": 0,
    "grouped": False,
    "quantized": False,
    "rank": 16,
    "targets": "linear",
    "use_cpu": True,
    "workers": 0,
}
"""What gpu.py varies, as this script has it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", default="one")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print where the time goes; for few steps")
    parser.set_defaults(**PLAIN)
    options, watch = parser.parse_args(), Watch()
    options.grouped = options.table == "whole"
    with profiled() if options.profile else nullcontext():
        losses = CONTENDERS[options.contender](options, watch)
    steps = watch.times
    began = float(os.environ.get("BENCH_STARTED", steps[0][0]))
    (first, _), (last, _) = steps[WARM_UP - 1], steps[-1]
    rows = sum(count for _, count in steps[WARM_UP:])
    third = len(steps) // 3
    figures = {
        "rows_per_second": rows / (last - first),
        "rows_per_second_at_last": sum(count for _, count in steps[-third:]) / (last - steps[-third - 1][0]),
        "seconds_to_first_step": steps[0][0] - began,
        "peak_rss_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": losses[0],
    }
    print(json.dumps(figures))


@contextmanager
def profiled() -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        yield
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def rows_of(options: argparse.Namespace) -> list[dict[str, str]]:
    """The rows in the order in which vlmtune takes them, so that each step of all contenders has the same ones."""
    from vlmtune.batching.order import Cut, Order

    with (options.folder / f"{options.table}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = [row["image_path"] for row in rows]
    order = Order(groups, Cut(options.batch, options.batch * options.accumulation), seed=0, by_group=options.grouped)
    return [rows[number] for step in range(options.steps) for number in order.step(step)]


def overrides(options: argparse.Namespace, folder: str) -> list[str]:
    lora = [f"adapter.r={options.rank}", f"adapter.lora_alpha={2 * options.rank}"]
    lora += [f"adapter.target_modules=[{','.join(TARGETS[options.targets])}]"]
    return [
        "model=auto",
        f"model.path={options.folder / 'model'}",
        *(["adapter=lora", *lora] if options.mode == "lora" else ["adapter=none"]),
        f"quantization={'nf4' if options.quantized else 'none'}",
        "data=csv",
        f"data.train={options.folder / options.table}.csv",
        "data.check_images=header",
        f"trainer.precision={options.precision}",
        f"trainer.max_steps={options.steps}",
        f"trainer.batch_size={options.batch}",
        f"trainer.gradient_accumulation_steps={options.accumulation}",
        f"trainer.gradient_checkpointing={str(options.checkpointing).lower()}",
        f"trainer.learning_rate={LEARNING_RATE}",
        "trainer.scheduler.warmup_fraction=0",
        f"trainer.num_workers={options.workers}",
        "trainer.eval_every=null",
        "trainer.eval_baseline=false",
        "trainer.log_every=1",
        f"hydra.run.dir={folder}",
    ]


def with_everything(options: argparse.Namespace, watch: Watch) -> list[float]:
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    own = ["tracker=wandb", "trainer.log_every=10", f"trainer.save_every={options.steps // 3}"]
    return with_vlmtune(options, watch, own)


def with_bare(options: argparse.Namespace, watch: Watch) -> list[float]:
    """The model, the batches and the optimizer of a run, under a loop of nine lines."""
    import torch

    from vlmtune import run
    from vlmtune.config import compose
    from vlmtune.data import table
    from vlmtune.objectives.next_token import summed_loss

    config, _ = compose.read("train", [*overrides(options, tempfile.mkdtemp()), "tracker=none"])
    built = run.build(config, table.load(config.data, config.task, 0), None)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    losses = []
    built.model.train()
    for batch in built.loader.micro_batches():
        with built.engine.autocast():
            loss = summed_loss(built.model, batch) / batch.supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        built.optimizer.step()
        built.optimizer.zero_grad(set_to_none=True)
        built.scheduler.step()
        losses.append(loss.item())
        watch.step(batch.rows)
    return losses


def with_vlmtune(
    options: argparse.Namespace, watch: Watch, extra: Sequence[str] = ("tracker=none", "trainer.save_every=null")
) -> list[float]:
    import vlmtune

    _watched(watch)
    with tempfile.TemporaryDirectory() as run:
        vlmtune.train([*overrides(options, f"{run}/run"), *extra])
        lines = [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def _watched(watch: Watch) -> None:
    """Have a run tell `watch` of its phases and steps."""
    from vlmtune.models import load
    from vlmtune.training import Journal
    from vlmtune.training.scoring import Scoring

    opened, after_step, training, evaluate = load.load, Journal.after_step, Journal.training, Scoring.evaluate

    def loading(*args: Any, **kwargs: Any) -> Any:
        found = opened(*args, **kwargs)
        watch.enter("start-up")
        return found

    def stepped(self: Any, step: Any) -> None:
        after_step(self, step)
        watch.step(step.examples)

    def started(self: Any) -> Any:
        watch.enter("first step")
        return training(self)

    def evaluating(*args: Any, **kwargs: Any) -> Any:
        watch.enter("evaluation")
        return evaluate(*args, **kwargs)

    load.load, Journal.after_step = loading, stepped  # type: ignore[method-assign]
    Journal.training, Scoring.evaluate = started, evaluating  # type: ignore[method-assign]


def opened(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    from vlmtune.prompt.image_only import image_only

    in_bf16 = options.precision == "bf16" and (options.mode == "lora" or not options.use_cpu)
    extra: dict[str, Any] = {} if options.use_cpu else {"device_map": {"": 0}}
    if options.quantized:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if in_bf16 else torch.float32,
            llm_int8_skip_modules=["visual", "lm_head"],
        )
    folder = options.folder / "model"
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16 if in_bf16 else torch.float32, **extra
    )
    return model, image_only(Qwen2VLProcessor).from_pretrained(folder)


def lora(options: argparse.Namespace) -> Any:
    from peft import LoraConfig

    modules = rf".*language_model.*\.({'|'.join(TARGETS[options.targets])})"
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.0, target_modules=modules)


def clock(options: argparse.Namespace, watch: Watch) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.enter("first step")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step(options.batch * options.accumulation)

    return Clock()


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    eight_bit = options.mode == "full" and not options.use_cpu
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_bnb_8bit" if eight_bit else "adamw_torch_fused",
        "bf16": options.precision == "bf16",
        "use_cpu": options.use_cpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": options.workers,
        "gradient_checkpointing": options.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.checkpointing else None,
        "per_device_eval_batch_size": 8,
        "prediction_loss_only": True,
    }


def collator(processor: Any) -> Any:
    """Rows of a table -> the arguments of a forward pass, as transformers' documentation shows it."""
    from PIL import Image

    start = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def collate(rows: list[dict[str, str]]) -> Any:
        texts = []
        for row in rows:
            user = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            answer = [{"type": "text", "text": row["answer"]}]
            chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            texts.append(processor.apply_chat_template(chat).rstrip("\n"))
        images = [[Image.open(row["image_path"]).convert("RGB")] for row in rows]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, ids in zip(labels, batch["input_ids"].tolist(), strict=True):
            at = max(n for n in range(len(ids)) if ids[n : n + len(start)] == start)
            row[: at + len(start)] = -100
        batch["labels"] = labels
        return batch

    return collate


def trained(trainer: Any, options: argparse.Namespace, watch: Watch) -> list[float]:
    """Train, and evaluate if asked; the losses of the steps."""
    trainer.train()
    if options.evaluated:
        watch.enter("evaluation")
        rows = trainer.train_dataset
        few = rows.select(range(options.evaluated)) if hasattr(rows, "select") else rows[: options.evaluated]
        trainer.evaluate(few)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trainer(options: argparse.Namespace, watch: Watch) -> list[float]:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model, processor = opened(options)
    watch.enter("start-up")
    if options.mode == "lora":
        model = get_peft_model(model, lora(options))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(options)),
        train_dataset=rows_of(options),  # type: ignore[arg-type]
        data_collator=collator(processor),
        callbacks=[clock(options, watch)],
    )
    return trained(trainer, options, watch)


def with_trl(options: argparse.Namespace, watch: Watch) -> list[float]:
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    model, processor = opened(options)
    watch.enter("start-up")
    rows = rows_of(options)
    table = {
        "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        "completion": [[{"role": "assistant", "content": row["answer"]}] for row in rows],
        "image": [row["image_path"] for row in rows],
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(options), max_length=None),
        train_dataset=Dataset.from_dict(table).cast_column("image", Image()),
        processing_class=processor,
        peft_config=lora(options) if options.mode == "lora" else None,
        callbacks=[clock(options, watch)],
    )
    return trained(trainer, options, watch)


CONTENDERS = {
    "vlmtune": with_vlmtune,
    "trainer": with_trainer,
    "trl": with_trl,
    "bare": with_bare,
    "everything": with_everything,
}

if __name__ == "__main__":
    sys.exit(main())
