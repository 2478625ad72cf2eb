"""pico: a Qwen2-VL of five million parameters, small enough to be pre-trained on a laptop's CPU.

`build` writes a complete Hugging Face folder (tokenizer, processor, random weights); training it is an ordinary run.
Every image becomes 64x64 pixels, so 64 patches of 8x8 and 16 language-model tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration

PATCH, MERGE, SIDE, VOCABULARY = 8, 2, 64, 1024
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_ENGLISH = (
    "user\nassistant\nsystem\n",
    "is there an object in the image? is there not? is it present? does the image contain or not contain it?",
    "what color is the shape? what shape is in the picture? which one, and where, and how many?",
    "describe this image. what do you see? answer in one word. a short answer, please.",
    "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. 0123456789",
    "yes no true false left right top bottom above below large small total table chart page date name price",
)


def build(folder: Path, seed: int) -> None:
    """Write an untrained pico into `folder`. The same seed gives the same weights, byte for byte."""
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(_config(tokenizer))
        _initialise(model)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, bos_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    _processor(tokenizer).save_pretrained(folder)


def _corpus() -> Iterator[str]:
    from vlmtune.data.sources.drawn.scenes import scene

    for seed in range(2000):
        for question, answer in scene(seed)[1]:
            yield f"{question}\n{answer}"
    for line in PLAIN_ENGLISH:
        yield from [line] * 200


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written, common words are one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=VOCABULARY - len(SPECIALS), initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    from vlmtune.prompt.image_only import image_only

    patches = {"patch_size": PATCH, "merge_size": MERGE, "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}}
    cls = image_only(Qwen2VLProcessor, patches)
    return cls(Qwen2VLImageProcessorPil(**patches), tokenizer, None, chat_template=CHAT_TEMPLATE)


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Small rotary bases: an image is 4x4 tokens wide, and Qwen2-VL's 1e6 would turn columns by under 0.001 rad."""
    from transformers import Qwen2VLConfig

    number = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [1, 1, 1, 1, 2, 2, 2, 3, 3]},
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 4,
        "embed_dim": 192,
        "hidden_size": 192,
        "num_heads": 6,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )


def _initialise(model: Qwen2VLForConditionalGeneration) -> None:
    """Scale each matrix by its fan-in: the library's fixed 0.02 suits wide models and starves one of width 192."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5 * _gain(name, model))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            _look_around(name, module)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def _look_around(name: str, layer: nn.Linear | nn.Conv3d) -> None:
    """Draw the biases of queries and keys at random, so that each head prefers some direction from the first step on.

    Rotary positions reach attention through products of queries and keys only. With zero biases nothing but content is
    rotated, and learning *where* something is waits until the model knows *what* it is.
    """
    from torch import nn

    if layer.bias is not None and name.endswith(("q_proj", "k_proj", "attn.qkv")):
        values = len(layer.bias) // 3 if name.endswith("qkv") else 0
        nn.init.normal_(layer.bias.data[: len(layer.bias) - values])


def _gain(name: str, model: Qwen2VLForConditionalGeneration) -> float:
    """Layers that write to the residual stream start small, the head smaller."""
    if name == "lm_head":
        return 0.2
    if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")):
        depth = model.config.vision_config.depth if "visual" in name else model.config.text_config.num_hidden_layers
        return float((2 * depth) ** -0.5)
    return 1.0


def release(run: Path, folder: Path) -> None:
    """Copy a finished pre-training's model into `folder`, its weights in bfloat16."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    import sys

    release(Path(sys.argv[1]), Path(__file__).parent / "pico_weights")
