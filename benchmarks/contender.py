"""One contender does the work once and prints its figures as JSON: `python benchmarks/contender.py trainer FOLDER ...`.

`trainer` is transformers' own Trainer with PEFT, written as its documentation shows; `trl` is SFTTrainer; `vlmtune` is
`vlmtune.train` with evaluation and trackers off. All train the same rows in the same types: LoRA with r=16 on the
language model over a frozen vision tower, or every weight.
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
from pathlib import Path
from typing import Any

WARM_UP = 5
"""Steps that are not counted."""
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=["vlmtune", "trainer", "trl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", default="one")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    steps, loss = {"vlmtune": with_vlmtune, "trainer": with_trainer, "trl": with_trl}[options.contender](options)
    began = float(os.environ.get("BENCH_STARTED", steps[0][0]))
    (first, _), (last, _) = steps[WARM_UP - 1], steps[-1]
    rows = sum(count for _, count in steps[WARM_UP:])
    figures = {
        "rows_per_second": rows / (last - first),
        "seconds_to_first_step": steps[0][0] - began,
        "peak_rss_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": loss,
    }
    print(json.dumps(figures))


def rows_of(options: argparse.Namespace) -> list[dict[str, str]]:
    with (options.folder / f"{options.table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def with_vlmtune(options: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    import vlmtune

    times: list[tuple[float, int]] = []
    from vlmtune.recorder import Recorder

    after_step = Recorder.after_step

    def timed(self: Any, step: Any) -> None:
        after_step(self, step)
        times.append((time.time(), step.examples))

    Recorder.after_step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as run:
        vlmtune.train(
            [
                "model=auto",
                f"model.path={options.folder / 'model'}",
                f"adapter={'lora' if options.mode == 'lora' else 'none'}",
                "data=csv",
                f"data.train={options.folder / options.table}.csv",
                "data.check_images=header",
                "tracker=none",
                f"trainer.precision={options.precision}",
                f"trainer.max_steps={options.steps}",
                f"trainer.batch_size={options.batch}",
                "trainer.save_every=null",
                "trainer.eval_every=null",
                "trainer.log_every=1",
                f"hydra.run.dir={run}/run",
            ]
        )
        lines = [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    return times, next(line["train/loss"] for line in lines if "train/loss" in line)


def opened(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    from vlmtune.models.processors import image_only

    dtype = torch.bfloat16 if options.precision == "bf16" and options.mode == "lora" else torch.float32
    model = Qwen2VLForConditionalGeneration.from_pretrained(options.folder / "model", dtype=dtype)
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


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }


def with_trainer(options: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    from peft import get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor = opened(options)
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
        args=TrainingArguments(**arguments(options)),
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


if __name__ == "__main__":
    sys.exit(main())
