"""The memory of training on a GPU, computed: `python benchmarks/gpu_memory.py` prints the tables of docs/gpu.md.

Weights, gradients and optimizer are arithmetic. The bytes of activations were counted on a CPU at the real widths under
bf16 autocast; `gpu_count.py` counts whole models. Everything is in GiB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu_work import MERGE, SHAPES, Shape

GIB, KIB = 2**30, 2**10
MODELS = {"2b": SHAPES["2b"], "7b": SHAPES["7b"], "72b": Shape(8192, 29568, 80, 64, 8, 152064)}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight, with an 8-bit scale for 64 weights and a float for 256 scales."""
EIGHT_BIT = 2 * (1 + 4 / 256)
"""Bytes of the 8-bit optimizer's two states of a weight, with a float for 256 values of each."""
KEPT = {"2b": 107.3, "7b": 234.3, "72b": 426.0}
"""KiB that a decoder layer with LoRA keeps of a token for its backward pass."""
KEPT_IN_ONE_STEP = {"2b": 95.3, "7b": 206.3}
"""The same with model.rewrites=on."""
KEPT_BY_ALL = {"2b": 101.1, "7b": 220.1}
"""The same where all weights train, without LoRA."""
WORK = 1.6
"""Peak of a layer's backward pass over what the layer keeps, as a factor."""
TOWER = 43.0
"""KiB of a patch, at most, while the vision tower runs forward."""
OTHER = 1.0
"""GiB for CUDA itself, its libraries, and gaps between tensors; an assumption."""


@dataclass(frozen=True)
class Setting:
    """One way to train; images of 1,280 tokens, 60 tokens of text, 20 of them supervised."""

    name: str
    size: str
    weights: str
    """`nf4`, `lora` (over bf16), `all` (bf16, 8-bit optimizer), `in_backward` (that, with the steps in the backward
    pass), `offload` and `offload_in_backward` (bf16, AdamW on the CPU), `fp32` (all, AdamW, computed in bf16)."""
    batch: int = 1
    checkpointing: bool = True
    rank: int = 16
    image: int = 1280
    text: int = 60
    supervised: int = 20

    @property
    def shape(self) -> Shape:
        return MODELS[self.size]

    @property
    def all_weights(self) -> bool:
        return self.weights not in ("nf4", "lora")


def weights(setting: Setting) -> float:
    """Bytes of the weights, with autocast's bf16 copies of fp32 ones."""
    shape = setting.shape
    total = count(shape)
    if setting.weights == "nf4":
        return NF4 * shape.decoder + 2 * (total - shape.decoder)
    return (6 if setting.weights == "fp32" else 2) * total


def count(shape: Shape) -> int:
    """Weights of all matrices. A head that is the embedding (Qwen2-VL 2B) counts twice."""
    return shape.decoder + 2 * shape.head + shape.vision + shape.merger


def lora(shape: Shape, rank: int) -> int:
    """Weights of LoRA on all linear layers of the decoder."""
    keys = shape.hidden * shape.key_heads // shape.heads
    attention = 2 * 2 * shape.hidden + 2 * (shape.hidden + keys)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


def trained(setting: Setting) -> float:
    """Bytes of gradients and the optimizer's states, with LoRA's own weights."""
    total = count(setting.shape)
    if not setting.all_weights:
        return 16.0 * lora(setting.shape, setting.rank)
    if setting.weights == "fp32":
        return 12.0 * total
    gradients = 2 * (setting.shape.head if setting.weights.endswith("in_backward") else total)
    return gradients + (0.0 if setting.weights.startswith("offload") else EIGHT_BIT * total)


def passing(setting: Setting) -> float:
    """Bytes that come and go: those of the passes, or the copies in a step of bf16 weights, whichever are more. A step
    in the backward pass needs both at once, and 4-bit weights are unpacked one at a time.
    """
    passes, step = max(activations(setting), tower(setting)), 8.0 * setting.shape.head
    if setting.weights == "in_backward":
        return passes + step
    if setting.weights == "nf4":
        return passes + 2.0 * setting.shape.hidden * setting.shape.intermediate
    return max(passes, step) if setting.weights == "all" else passes


def activations(setting: Setting) -> float:
    """Bytes at the peak of the backward pass: what all layers keep, one layer at work, logits and their gradients."""
    shape, tokens = setting.shape, setting.batch * (setting.image + setting.text)
    layer = (KEPT_BY_ALL if setting.all_weights else KEPT)[setting.size] * KIB
    kept = 2 * shape.hidden * shape.layers if setting.checkpointing else layer * (shape.layers - 1)
    logits = 12 * shape.vocabulary * setting.batch * setting.supervised
    tower = setting.batch * setting.image * MERGE**2 * tower_kept(setting) if setting.all_weights else 0.0
    return tokens * (kept + WORK * layer) + logits + tower


def tower_kept(setting: Setting) -> float:
    """Bytes of a patch that a tower which trains keeps while the language model runs: the inputs of its blocks."""
    assert setting.checkpointing, "not counted"
    return 2.0 * setting.shape.blocks * setting.shape.tower


def tower(setting: Setting) -> float:
    """Bytes while the tower runs forward."""
    return setting.batch * setting.image * MERGE**2 * TOWER * KIB


SETTINGS = (
    Setting("QLoRA", "2b", "nf4", batch=4),
    Setting("LoRA", "2b", "lora", batch=4),
    Setting("all weights", "2b", "all", batch=4),
    Setting("QLoRA", "7b", "nf4"),
    Setting("QLoRA", "7b", "nf4", batch=4),
    Setting("QLoRA, activations kept", "7b", "nf4", checkpointing=False),
    Setting("LoRA of rank 8, ms-swift's setting", "7b", "lora", rank=8),
    Setting("LoRA", "7b", "lora"),
    Setting("LoRA", "7b", "lora", batch=8),
    Setting("LoRA, activations kept", "7b", "lora", batch=2, checkpointing=False),
    Setting("LoRA, activations kept", "7b", "lora", batch=4, checkpointing=False),
    Setting("LoRA, activations kept", "7b", "lora", batch=8, checkpointing=False),
    Setting("all weights, offload and step in backward", "7b", "offload_in_backward"),
    Setting("all weights, offload", "7b", "offload"),
    Setting("all weights, step in backward", "7b", "in_backward"),
    Setting("all weights", "7b", "all"),
    Setting("all weights", "7b", "all", batch=4),
    Setting("all weights", "7b", "all", batch=16),
    Setting("all weights in fp32", "7b", "fp32"),
    Setting("QLoRA", "72b", "nf4"),
)
CARDS = {"16 GB": 14.7, "24 GB": 23.5, "40 GB": 39.4, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.8}
"""GiB that a program can have: the least of the common cards (T4, RTX 3090 and 4090, A100, L40S, H100, H200)."""


def table(settings: Iterable[Setting] = SETTINGS) -> str:
    """The settings with their memory and the smallest card, in Markdown."""
    lines = [
        "| model | setting | rows | weights | trained | passing | sum | card |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        parts = [weights(setting) / GIB, trained(setting) / GIB, passing(setting) / GIB]
        total = sum(parts) + OTHER
        card = next((name for name, size in CARDS.items() if total < 0.95 * size), "none")
        figures = " | ".join(f"{part:.1f}" for part in (*parts, total))
        lines.append(f"| {setting.size.upper()} | {setting.name} | {setting.batch} | {figures} | {card} |")
    return "\n".join(lines)


def arithmetic() -> str:
    """What each part of the memory takes, as formulas and for the 7B, in Markdown."""
    nf4, lora_, all_, step = (Setting("", "7b", name) for name in ("nf4", "lora", "all", "in_backward"))
    fp32, kept = Setting("", "7b", "fp32"), Setting("", "7b", "lora", checkpointing=False)
    shape = MODELS["7b"]
    logits = 12 * shape.vocabulary * lora_.supervised
    rows = {
        "weights, bf16 | 2 W": weights(lora_),
        "weights, nf4 | 0.52 for each of the decoder's, 2 for each other": weights(nf4),
        "weights, fp32, with autocast's bf16 copies | (4 + 2) W": weights(fp32),
        "LoRA of rank 16: fp32 weights, gradients and AdamW's states | 16 for each of LoRA's weights": trained(lora_),
        "all weights in bf16: gradients and an 8-bit optimizer's states | (2 + 2.03) W": trained(all_),
        "the same with the steps in the backward pass: the largest gradient | 2 h V + 2.03 W": trained(step),
        "all weights in fp32: gradients and AdamW's states | 12 W": trained(fp32),
        "a step of bf16 weights: the largest one and its gradient in fp32 | 8 h V": 8.0 * shape.head,
        f"activations, checkpointed: inputs of layers, one layer at work | T (2 h L + {WORK:.1f} K)": activations(lora_)
        - logits,
        f"activations, kept | T (L - 1 + {WORK:.1f}) K": activations(kept) - logits,
        "logits of supervised tokens in bf16 and fp32, and gradients | 12 V for each": logits,
        f"the frozen tower, before the rest | {TOWER:.0f} KiB for each patch, 4 to a token": tower(lora_),
    }
    lines = ["| what | bytes | 7B, GiB |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {found / GIB:.2f} |" for what, found in rows.items())])


def counted() -> str:
    """K of the formulas: KiB that a decoder layer keeps of a token, in Markdown."""
    lines = ["| a layer keeps of a token, KiB | 2B | 7B | 72B |", "|---|---|---|---|"]
    kinds = {"LoRA": KEPT, "LoRA with `model.rewrites=on`": KEPT_IN_ONE_STEP, "all weights": KEPT_BY_ALL}
    for kind, own in kinds.items():
        lines.append(f"| {kind} | {' | '.join(f'{own[size]:.0f}' if size in own else '-' for size in MODELS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), arithmetic(), counted(), sep="\n\n")
