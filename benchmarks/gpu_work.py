"""Models of Qwen2-VL's sizes with random weights, rows about drawn images, and the FLOPs of a row.

`python benchmarks/gpu_work.py 7b FOLDER` writes a model, a shard at a time: no process holds more than one shard of it.
`python benchmarks/gpu_work.py rows FOLDER 36x36 8 96` writes 96 rows, eight questions of each image.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

PATCH, MERGE = 14, 2
SHARD = 2 * 2**30
"""Bytes of one file of weights."""
MOST_TOKENS = 1296
"""The most tokens of an image: 36 x 36, from 1008 x 1008 pixels."""


@dataclass(frozen=True)
class Shape:
    """The widths and depths of a model: the language model's, then the vision tower's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tower: int = 1280
    blocks: int = 32
    tower_heads: int = 16

    @property
    def decoder(self) -> int:
        """Weights of the decoder's matrices."""
        keys = self.hidden * self.key_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * keys + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def vision(self) -> int:
        """Weights of the tower's matrices; its MLP is four times as wide."""
        return self.blocks * 12 * self.tower**2 + 2 * 3 * PATCH**2 * self.tower

    @property
    def merger(self) -> int:
        """Weights of the projector's two matrices."""
        wide = self.tower * MERGE**2
        return wide * wide + wide * self.hidden


SHAPES = {
    "7b": Shape(3584, 18944, 28, 28, 4, 152064),
    "2b": Shape(1536, 8960, 28, 12, 2, 151936),
    "tiny": Shape(128, 256, 2, 4, 2, 2048, tower=64, blocks=2, tower_heads=2),  # to try the scripts on a CPU
}

FORMULA = """\
MFU = rows/s x FLOPs of a row / the device's dense bf16 peak. FLOPs of a row, the plain way (every row with its image):
c x weights of a part x its tokens, where c = 6 if the part trains, 4 if it only passes gradients on (LoRA, nf4), 2 if
it only runs forward (a frozen tower, per patch); and attention, a x 2 x tokens^2 x width x layers (twice that in the
tower, which is not causal), where a = 3, or 1 if it only runs forward. Recomputed activations don't count. Work that is
shared between rows counts for each row, so a contender that shares it can be above 100 %."""


def flops(shape: Shape, image: int, text: int, *, all_weights: bool) -> float:
    """FLOPs that the plain way spends on a row with `image` and `text` tokens."""
    tokens, patches = image + text, image * MERGE**2
    trained, passing, forward = 6, 4, 2
    language = (trained if all_weights else passing) * (shape.decoder + shape.head) * tokens
    language += 3 * 2 * tokens**2 * shape.hidden * shape.layers
    weights = shape.vision * patches + shape.merger * image
    tower = (trained if all_weights else forward) * weights
    tower += (3 if all_weights else 1) * 4 * patches**2 * shape.tower * shape.blocks
    return float(language + tower)


def write_model(size: str, folder: Path) -> None:
    """Random bf16 weights in the hub's layout, with pico's tokenizer and a vocabulary of the real width."""
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    from vlmtune.models import pico
    from vlmtune.prompt.image_only import image_only

    tokenizer = pico._tokenizer()
    config = model_config(SHAPES[size], pico._config(tokenizer).to_dict(), tokenizer.eos_token_id)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    limits = {"shortest_edge": 56 * 56, "longest_edge": MOST_TOKENS * (PATCH * MERGE) ** 2}
    images = ImageProcessor(patch_size=PATCH, merge_size=MERGE, size=limits)
    image_only(Qwen2VLProcessor)(images, tokenizer, None, chat_template=pico.CHAT_TEMPLATE).save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    write_shards({name: tensor.shape for name, tensor in model.state_dict().items()}, folder)
    config.architectures, config.dtype = ["Qwen2VLForConditionalGeneration"], torch.bfloat16
    config.save_pretrained(folder)  # last: a folder with a config.json is complete


def model_config(shape: Shape, small: dict[str, Any], end: int) -> Any:
    """Qwen2-VL's config of this shape. `small`: a config that has the tokenizer's special ids."""
    from transformers import Qwen2VLConfig

    half = shape.hidden // shape.heads // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "rope_parameters": rope,
        "max_position_embeddings": 32768,
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    vision = {
        "embed_dim": shape.tower,
        "hidden_size": shape.hidden,
        "depth": shape.blocks,
        "num_heads": shape.tower_heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    ids = {key: value for key, value in small.items() if key.endswith("_token_id")}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def write_shards(shapes: dict[str, Any], folder: Path) -> None:
    """Weights of these shapes: norms 1, biases 0, matrices normal with a deviation of 0.02."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(0)

    def drawn(name: str, shape: Any) -> Any:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.normal_(0, 0.02, generator=random).cpu()

    shards = list(in_shards(shapes))
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: drawn(name, shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_shards(shapes: dict[str, Any]) -> Iterator[list[str]]:
    """Names of tensors in lists of at most `SHARD` bytes."""
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if names and held + size > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


QUESTION, ANSWER = "What is shape number {} in this image, and where is it?", "a circle"


def write_rows(path: Path, image: str, questions: int, count: int) -> None:
    """`count` rows, `questions` of each image. `image`: tokens across and down, such as `36x36`."""
    import numpy as np
    from PIL import Image

    across, down = map(int, image.split("x"))
    side = PATCH * MERGE
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "question", "answer"])
        for row in range(count):
            picture = path.with_name(f"{image}_{row // questions}.png")
            if not picture.exists():
                shape = (down * side // 7, across * side // 7, 3)
                noise = np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(noise).resize((across * side, down * side)).save(picture)
            writer.writerow([picture, QUESTION.format(row % questions), ANSWER])


def text_tokens(model: Path) -> int:
    """Tokens of a row besides those of its image."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    user = [{"type": "image"}, {"type": "text", "text": QUESTION.format(0)}]
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": ANSWER}]
    return len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n"))["input_ids"]) - 1


if __name__ == "__main__":
    what, target, *rest = sys.argv[1:]
    Path(target).mkdir(parents=True, exist_ok=True)
    if what == "rows":
        write_rows(Path(target) / "rows.csv", rest[0], int(rest[1]), int(rest[2]))
    else:
        write_model(what, Path(target))
