"""Qwen2-VL's sizes on one GPU, against the plain Trainer: `python benchmarks/gpu.py > table.md`.

Needs torch, transformers, accelerate, peft, hydra-core, omegaconf, bitsandbytes for nf4, and nothing else: weights are
random, images are drawn here. For each setting both train the same rows in processes of their own; a row of the table
has rows/s, tokens/s, MFU, the highest device memory, and the first loss.

MFU counts what the plain way computes: 6 FLOPs per weight and token where a weight trains, 4 where its part only passes
gradients on, 2 where it only runs forward; attention is left out. The peak is that of dense bf16.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "7b": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision": {"hidden_size": 3584},
    },
    "2b": {
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision": {"hidden_size": 1536},
    },
    "tiny": {  # to try the script itself on a CPU
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2048,
        },
        "vision": {"hidden_size": 128, "embed_dim": 64, "depth": 2, "num_heads": 2},
    },
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bf16 FLOP/s by a part of the device's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["2b", "7b"], choices=list(SIZES))
    parser.add_argument("--quantizations", nargs="+", default=["none", "nf4"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[224, 1008], help="sides of square images")
    parser.add_argument("--questions", nargs="+", type=int, default=[1, 8], help="rows per image")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help="used by the script itself")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(once(options)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    import transformers

    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{options.steps} steps of {options.batch} rows, the first 3 not counted; LoRA r=16 on the language model\n")
    print("| model | weights | pixels | rows per image | contender | rows/s | tokens/s | MFU | peak GiB | first loss |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(size, Path(folder))
            for quantization in options.quantizations:
                for pixels in options.pixels:
                    for questions in options.questions:
                        compare(options, device, size, quantization, pixels, questions, Path(folder))


def write_model(size: str, folder: Path) -> None:
    """Random bf16 weights in the hub's layout, with pico's tokenizer and a vocabulary of the real width."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    from vlmtune.models import pico
    from vlmtune.prompt.image_only import image_only

    tokenizer = pico._tokenizer()
    small = pico._config(tokenizer).to_dict()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    head = SIZES[size]["text"]["hidden_size"] // SIZES[size]["text"]["num_attention_heads"]
    if head != 128:
        rope["mrope_section"] = [head // 8, head * 3 // 16, head * 3 // 16]
    text = {"rope_parameters": rope, "max_position_embeddings": 32768, "eos_token_id": tokenizer.eos_token_id}
    ids = {key: value for key, value in small.items() if key.endswith("_token_id")}
    vision = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
    config = Qwen2VLConfig(
        text_config={**text, **SIZES[size]["text"], "tie_word_embeddings": False},
        vision_config={**vision, **SIZES[size]["vision"]},
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    images = ImageProcessor(patch_size=14, merge_size=2, size=limits)
    processor = image_only(Qwen2VLProcessor)(images, tokenizer, None, chat_template=pico.CHAT_TEMPLATE)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def write_rows(folder: Path, pixels: int, questions: int, count: int) -> None:
    with (folder / "one.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "question", "answer"])
        for row in range(count):
            path = folder / f"{pixels}_{row // questions}.png"
            if not path.exists():
                noise = np.random.default_rng(row).integers(0, 256, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
                Image.fromarray(noise).resize((pixels, pixels)).save(path)
            writer.writerow(
                [path, f"What is shape number {row % questions} in this image, and where is it?", "a circle"]
            )


def compare(
    options: argparse.Namespace,
    device: str,
    size: str,
    quantization: str,
    pixels: int,
    questions: int,
    folder: Path,
) -> None:
    write_rows(folder, pixels, questions, options.steps * options.batch)
    for name in ("trainer", "vlmtune"):
        command = [sys.executable, __file__, "--one", name, str(folder), "--quantizations", quantization]
        command += ["--steps", str(options.steps), "--batch", str(options.batch)]
        environment = {**os.environ, "BENCH_PEAK": str(next((v for k, v in PEAKS.items() if k in device), 0.0))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        start = f"| {size} | {quantization} | {pixels} | {questions} | {name} |"
        if done.returncode:
            print(f"{start} failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:90]} | | | | |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"{start} {found['rows_per_second']:.1f} | {found['tokens_per_second']:.0f} | {found['mfu']:.1%} "
            f"| {found['peak_gib']:.1f} | {found['first_loss']:.3f} |",
            flush=True,
        )


def once(options: argparse.Namespace) -> dict[str, float]:
    """Train in this process and measure."""
    import contender

    name, folder = options.one[0], Path(options.one[1])
    quantization = options.quantizations[0]
    options.folder, options.table, options.mode, options.precision = folder, "one", "lora", "bf16"
    if name == "vlmtune":
        extra = ("tracker=none", "trainer.save_every=null", f"quantization={quantization}")
        times, loss = contender.with_vlmtune(options, extra)
    else:
        use_cpu = not torch.cuda.is_available()
        times, loss = contender.with_trainer(options, quantized=quantization == "nf4", use_cpu=use_cpu)
    (first, _), (last, _) = times[2], times[-1]
    rows = sum(count for _, count in times[3:]) / (last - first)
    tokens, flops = of_a_row(folder)
    peak = float(os.environ.get("BENCH_PEAK", 0))
    return {
        "rows_per_second": rows,
        "tokens_per_second": rows * tokens,
        "mfu": rows * flops / peak if peak else 0.0,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "first_loss": loss,
    }


def of_a_row(folder: Path) -> tuple[int, float]:
    """Tokens of a padded row, and the FLOPs that the plain way spends on it."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import AutoConfig

    from vlmtune.config.schema import DataConfig, ModelConfig, TaskConfig
    from vlmtune.data import table
    from vlmtune.models.parts import find_parts, summary
    from vlmtune.prompt.encode import Encoder
    from vlmtune.prompt.processors import load_processor

    path = str(folder / "model")
    data = DataConfig(train=str(folder / "one.csv"), check_images="header", max_train_rows=1)
    row = table.load(data, TaskConfig(), 0)["train"].records
    encoder = Encoder(load_processor(ModelConfig(path=path)))
    image, text = encoder.lengths(row)[0]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    weights = {part: found["total"] for part, found in summary(model, find_parts(model)).items()}
    embedding = model.get_input_embeddings().weight.numel()
    language = 4 * (weights["language"] - embedding + weights["head"]) * (image + text)
    merge = 4  # patches per token
    return image + text, language + 2 * (weights["vision"] * image * merge + weights["projector"] * image)


if __name__ == "__main__":
    main()
