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
from vlmtune.prompt.image_only import image_only

SIDE, PATCH, MERGE = 224, 14, 2
TABLES = {"one": "one question an image", "whole": "all questions of an image (9.6 on average)"}


def prepare(folder: Path, rows: int) -> None:
    """Write the model and both tables into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model")
    for name, most in (("one", 1), ("whole", 1000)):
        write_table(folder / f"{name}.csv", rows, most)


def write_table(path: Path, rows: int, per_image: int) -> None:
    """`rows` of easy-VQA, of each image at most `per_image`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "question", "answer"])
        writer.writerows(list(_rows(per_image))[:rows])


def _rows(per_image: int) -> Iterator[tuple[str, str, str]]:
    questions, answers, images = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    by_image: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        by_image.setdefault(image, []).append(row)
    for own in by_image.values():
        for row in own[:per_image]:
            yield paths[images[row]], questions[row], answers[row]


def write_model(folder: Path, side: int = SIDE, layers: int = 4) -> None:
    """pico's sizes with Qwen2-VL's own patches, untrained. `layers`: of the vision tower and of the decoder each."""
    tokenizer = pico._tokenizer()
    small = pico._config(tokenizer).to_dict()
    vision = {**small["vision_config"], "patch_size": PATCH, "spatial_merge_size": MERGE, "depth": layers}
    text = {**small["text_config"], "num_hidden_layers": layers, "layer_types": None}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{**small, "vision_config": vision, "text_config": text}))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    images = ImageProcessor(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": side**2, "longest_edge": side**2}
    )
    processor = image_only(Qwen2VLProcessor)(images, tokenizer, None, chat_template=pico.CHAT_TEMPLATE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
