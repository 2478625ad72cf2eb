"""Time to prepare large images, with JPEGs decoded whole and reduced, on one thread: `python benchmarks/images.py`."""

from __future__ import annotations

import argparse
import io
import statistics
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPImageProcessorPil
from transformers import Qwen2VLImageProcessorPil as QwenImages

from vlmtune.data.images import NeededSize, open_image

PROCESSORS = {
    "Qwen2-VL, 1280 tokens": (
        QwenImages(size={"shortest_edge": 3136, "longest_edge": 1280 * 28 * 28}),
        NeededSize(pixels=1280 * 28 * 28),
    ),
    "Qwen2-VL, 256 tokens": (
        QwenImages(size={"shortest_edge": 3136, "longest_edge": 256 * 28 * 28}),
        NeededSize(pixels=256 * 28 * 28),
    ),
    "LLaVA-1.5, 336 pixels": (
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        NeededSize(side=336),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| image | processor | images/s whole | reduced | ratio | mean difference, of 255 | largest 1 % above |")
    print("|---|---|---|---|---|---|---|")
    for kind, data in (("12-megapixel photo", photo()), ("scanned page, 300 dpi", page())):
        for name, (processor, needed) in PROCESSORS.items():
            seconds: dict[bool, list[float]] = {True: [], False: []}
            made = {}
            for _ in range(options.rounds):
                for reduced in (False, True):
                    began = time.perf_counter()
                    picture = open_image(data, 100_000_000, needed if reduced else None)
                    made[reduced] = processor(picture, return_tensors="pt")["pixel_values"]
                    seconds[reduced].append(time.perf_counter() - began)
            whole, fast = statistics.median(seconds[False]), statistics.median(seconds[True])
            gap = (made[True] - made[False]).abs().flatten() * 0.27 * 255  # pixels are divided by about 0.27
            most = gap.kthvalue(int(0.99 * len(gap))).values
            rates = f"{1 / whole:.1f} | {1 / fast:.1f} | {whole / fast:.1f}"
            print(f"| {kind} | {name} | {rates} | {gap.mean():.1f} | {most:.0f} |")


def photo() -> bytes:
    """Noise at several scales, about as hard to compress as a photo."""
    random = np.random.default_rng(0)
    total = np.zeros((3000, 4000, 3), np.float32)
    for scale in (4, 16, 64, 256):
        small = random.integers(0, 256, (3000 // scale + 1, 4000 // scale + 1, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(small).resize((4000, 3000), Image.Resampling.BICUBIC), np.float32) * scale
    image = Image.fromarray((total / (4 + 16 + 64 + 256)).clip(0, 255).astype(np.uint8))
    return encoded(image)


def page() -> bytes:
    """A page of text in the size of A4 at 300 dots per inch."""
    image = Image.new("RGB", (2480, 3508), "white")
    draw = ImageDraw.Draw(image)
    for line in range(60):
        draw.text(
            (200, 200 + 52 * line), f"{line}: the quick brown fox jumps over the lazy dog " * 2, "black", font_size=36
        )
    return encoded(image.filter(ImageFilter.GaussianBlur(0.7)))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
