"""The work that all contenders do: a small Qwen2-VL, easy-VQA at 224 pixels (64 image tokens), batches of 8 rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import easy_vqa
import torch
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers import Qwen2VLImageProcessorPil as ImageProcessor

from vlmtune.models import pico
from vlmtune.models.processors import image_only

SIDE, PATCH, MERGE = 224, 14, 2
TABLES = {"one": "one question an image", "whole": "all questions of an image (9.6 on average)"}


def prepare(folder: Path, rows: int) -> None:
    """Write the model and both tables into `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        _write_model(folder / "model")
    for name in TABLES:
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "question", "answer"])
            writer.writerows(list(_rows(name))[:rows])


def _rows(name: str) -> Iterator[tuple[str, str, str]]:
    questions, answers, images = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    by_image: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        by_image.setdefault(image, []).append(row)
    for own in by_image.values():
        for row in own[:1] if name == "one" else own:
            yield paths[images[row]], questions[row], answers[row]


def _write_model(folder: Path) -> None:
    """pico's sizes with Qwen2-VL's own patches, untrained."""
    tokenizer = pico._tokenizer()
    small = pico._config(tokenizer).to_dict()
    vision = {**small["vision_config"], "patch_size": PATCH, "spatial_merge_size": MERGE}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{**small, "vision_config": vision}))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    images = ImageProcessor(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    )
    processor = image_only(Qwen2VLProcessor)(images, tokenizer, None, chat_template=pico.CHAT_TEMPLATE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
