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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

WARM_UP = 5
"""Steps that are not counted."""
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


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
    options = parser.parse_args()
    with profiled() if options.profile else nullcontext():
        steps, loss = CONTENDERS[options.contender](options)
    began = float(os.environ.get("BENCH_STARTED", steps[0][0]))
    (first, _), (last, _) = steps[WARM_UP - 1], steps[-1]
    rows = sum(count for _, count in steps[WARM_UP:])
    third = len(steps) // 3
    figures = {
        "rows_per_second": rows / (last - first),
        "rows_per_second_at_last": sum(count for _, count in steps[-third:]) / (last - steps[-third - 1][0]),
        "seconds_to_first_step": steps[0][0] - began,
        "peak_rss_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": loss,
    }
    print(json.dumps(figures))


@contextmanager
def profiled() -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        yield
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def rows_of(options: argparse.Namespace) -> list[dict[str, str]]:
    with (options.folder / f"{options.table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def overrides(options: argparse.Namespace, folder: str) -> list[str]:
    return [
        "model=auto",
        f"model.path={options.folder / 'model'}",
        f"adapter={'lora' if options.mode == 'lora' else 'none'}",
        "data=csv",
        f"data.train={options.folder / options.table}.csv",
        "data.check_images=header",
        f"trainer.precision={options.precision}",
        f"trainer.max_steps={options.steps}",
        f"trainer.batch_size={options.batch}",
        "trainer.eval_every=null",
        "trainer.log_every=1",
        f"hydra.run.dir={folder}",
    ]


def with_everything(options: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    return with_vlmtune(options, ["tracker=wandb", "trainer.log_every=10", f"trainer.save_every={options.steps // 3}"])


def with_bare(options: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    """The model, the batches and the optimizer of a run, under a loop of nine lines."""
    import torch

    from vlmtune import run
    from vlmtune.config import compose
    from vlmtune.data import table
    from vlmtune.objectives.next_token import summed_loss

    config, _ = compose.read("train", [*overrides(options, tempfile.mkdtemp()), "tracker=none"])
    built = run.build(config, table.load(config.data, config.task, 0), None)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    times, losses = [], []
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
        times.append((time.time(), batch.rows))
    return times, losses[0]


def with_vlmtune(
    options: argparse.Namespace, extra: Sequence[str] = ("tracker=none", "trainer.save_every=null")
) -> tuple[list[tuple[float, int]], float]:
    import vlmtune

    times: list[tuple[float, int]] = []
    from vlmtune.training import Journal

    after_step = Journal.after_step

    def timed(self: Any, step: Any) -> None:
        after_step(self, step)
        times.append((time.time(), step.examples))

    Journal.after_step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as run:
        vlmtune.train([*overrides(options, f"{run}/run"), *extra])
        lines = [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    return times, next(line["train/loss"] for line in lines if "train/loss" in line)


def opened(options: argparse.Namespace, quantized: bool = False, use_cpu: bool = True) -> tuple[Any, Any]:
    import torch
    from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    from vlmtune.prompt.image_only import image_only

    dtype = torch.bfloat16 if options.precision == "bf16" and options.mode == "lora" else torch.float32
    extra: dict[str, Any] = {} if use_cpu else {"device_map": {"": 0}}
    if quantized:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["visual", "lm_head"],
        )
    model = Qwen2VLForConditionalGeneration.from_pretrained(options.folder / "model", dtype=dtype, **extra)
    return model, image_only(Qwen2VLProcessor).from_pretrained(options.folder / "model")


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)


def clock(options: argparse.Namespace) -> tuple[Any, list[tuple[float, int]]]:
    from transformers import TrainerCallback

    times: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append((time.time(), options.batch))

    return Clock(), times


def arguments(options: argparse.Namespace, use_cpu: bool = True) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "bf16": options.precision == "bf16",
        "use_cpu": use_cpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }


def with_trainer(
    options: argparse.Namespace, quantized: bool = False, use_cpu: bool = True
) -> tuple[list[tuple[float, int]], float]:
    from peft import get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor = opened(options, quantized, use_cpu)
    if options.mode == "lora":
        model = get_peft_model(model, lora())
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

    callback, times = clock(options)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(options, use_cpu)),
        train_dataset=rows_of(options),  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train()
    return times, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def with_trl(options: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    model, processor = opened(options)
    rows = rows_of(options)
    table = {
        "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        "completion": [[{"role": "assistant", "content": row["answer"]}] for row in rows],
        "image": [row["image_path"] for row in rows],
    }
    callback, times = clock(options)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(options), max_length=None),
        train_dataset=Dataset.from_dict(table).cast_column("image", Image()),
        processing_class=processor,
        peft_config=lora() if options.mode == "lora" else None,
        callbacks=[callback],
    )
    trainer.train()
    return times, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


CONTENDERS = {
    "vlmtune": with_vlmtune,
    "trainer": with_trainer,
    "trl": with_trl,
    "bare": with_bare,
    "everything": with_everything,
}

if __name__ == "__main__":
    sys.exit(main())
