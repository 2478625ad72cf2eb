"""Tiny checkpoints of the model families beyond Qwen2-VL and LLaVA 1.5: real geometry in kind, 0.3 million weights.

Each function writes a complete folder in the hub's layout. Prompt formats follow the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers as hf
from torch import nn

import tiny
from vlmtune.prompt.image_only import image_only, torchvision_works

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 64,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
SQUARE = {"height": 56, "width": 56}
TILES = [[56, 112], [112, 56], [112, 112]]
MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content[0].text }}</s> "
    "{% else %}{{ message.content[0].text }}\n{% endif %}{% endfor %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.content[0].type != 'image' %} {% endif %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def chatml(image: str) -> str:
    """Qwen's chat format without a system prompt of its own, with `image` as the placeholder."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def byte_tokenizer(specials: Sequence[str], end: str, pad: str = "<|endoftext|>", **named: Any) -> Any:
    backend = tiny.byte_bpe(specials)
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=pad, **named)


def llama_tokenizer(specials: Sequence[str], pad: str = "<pad>", **named: Any) -> Any:
    backend = tiny.sentencepiece_bpe(specials)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad, **named
    )


def gemma_tokenizer(specials: Sequence[str], pad: str, **named: Any) -> Any:
    backend = tiny.sentencepiece_bpe(specials, base=("<unk>", "<bos>", "<eos>"), prefix=False)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token=pad, **named
    )


def processor_of(cls: Any, images: Any, tokenizer: Any, video: str, **options: Any) -> Any:
    """A processor without its video half where torchvision can't be used."""
    if torchvision_works():
        return cls(images, tokenizer, getattr(hf, video)(), **options)
    return image_only(cls)(images, tokenizer, None, **options)


def ids_of(tokenizer: Any) -> dict[str, int]:
    """Vocabulary size and special ids, as text configs name them."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write(folder: Path, model: Any, processor: Any, end: str | None = None) -> None:
    tokenizer = processor.tokenizer
    stop = tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id
    tiny.write(folder, model, processor, stop, tokenizer.pad_token_id)


# ---------------------------------------------------------------- Qwen


def qwen_vision(tokenizer: Any) -> dict[str, int]:
    number = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }


def qwen_processor(cls: Any, tokenizer: Any, patch: int, video: str) -> Any:
    side = 2 * patch
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": side**2, "longest_edge": 16 * side**2}
    )
    return processor_of(cls, images, tokenizer, video, chat_template=tiny.CHATML)


def qwen2_5_vl(folder: Path) -> None:
    """Windowed attention in the tower, with a full one in its second layer."""
    tokenizer = byte_tokenizer(tiny.QWEN_SPECIALS, "<|im_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 14}
    config = hf.Qwen2_5_VLConfig(
        text_config={**tiny.TEXT, **ids_of(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            **vision,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **qwen_vision(tokenizer),
    )
    processor = qwen_processor(hf.Qwen2_5_VLProcessor, tokenizer, 14, "Qwen2VLVideoProcessor")
    write(folder, hf.Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen3_vl(folder: Path) -> None:
    """Features of the tower's first layer join the first language layer (deepstack)."""
    tokenizer = byte_tokenizer(tiny.QWEN_SPECIALS, "<|im_end|>")
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 16}
    config = hf.Qwen3VLConfig(
        text_config={**tiny.TEXT, **ids_of(tokenizer), "head_dim": 16, "rope_parameters": rope},
        vision_config={
            **vision,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **qwen_vision(tokenizer),
    )
    processor = qwen_processor(hf.Qwen3VLProcessor, tokenizer, 16, "Qwen3VLVideoProcessor")
    write(folder, hf.Qwen3VLForConditionalGeneration(config), processor)


# ---------------------------------------------------------------- LLaVA


def llava_next(folder: Path) -> None:
    """Tiles of any shape plus an overview, features cut to the unpadded image, a newline after each row."""
    tokenizer = llama_tokenizer(["<image>", "<pad>"])
    config = hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config={**tiny.TEXT, **ids_of(tokenizer), "model_type": "mistral", "sliding_window": None},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=TILES,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=TILES)
    processor = hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    )
    write(folder, hf.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> None:
    """As LLaVA-NeXT, but several images of one row are not tiled; the template writes a space before given answers."""
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"], "<|im_end|>")
    tiles = [[56, 56], *TILES]
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={**tiny.TEXT, **ids_of(tokenizer), "model_type": "qwen2", "tie_word_embeddings": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    images = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=tiles)
    given = "{{ message.role }}{{ ' ' if message.role == 'assistant' }}\n"
    processor = processor_of(
        hf.LlavaOnevisionProcessor,
        images,
        tokenizer,
        "LlavaOnevisionVideoProcessor",
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>").replace("{{ message.role }}\n", given),
    )
    write(folder, hf.LlavaOnevisionForConditionalGeneration(config), processor)


# ---------------------------------------------------------------- Idefics and SmolVLM


def idefics(folder: Path) -> None:
    """Cross-attention to 4 latents of a perceiver; the last three ids are in an embedding of their own."""
    extra = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer = llama_tokenizer(extra, pad="<unk>", additional_special_tokens=extra)
    vision = {"embed_dim": 64, "image_size": 28, "patch_size": 14, "intermediate_size": 128}
    config = hf.IdeficsConfig(
        vocab_size=len(tokenizer) - 3,
        additional_vocab_size=3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=1,
        alpha_initializer="ones",  # real ones start at 0, and an untrained model would ignore its images
        alpha_type="vector",
        use_resampler=True,
        qk_layer_norms=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 2},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    )
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessorPil(image_size=28), tokenizer)
    write(folder, hf.IdeficsForVisionText2Text(config), processor, "<end_of_utterance>")


def split_images(kind: str, folder: Path) -> None:
    """Images cut into tiles of 28 pixels, each between row-and-column markers, and an overview."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = byte_tokenizer(["<|im_start|>", "<|endoftext|>", *marks, *places], "<end_of_utterance>")
    tokenizer.bos_token = "<|im_start|>"
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    config = getattr(hf, f"{name}Config")(
        text_config={**tiny.TEXT, **ids_of(tokenizer), "model_type": "llama"},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = getattr(hf, f"{name}ImageProcessorPil")(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    options = {"image_seq_len": 4, "chat_template": SMOL}
    cls = getattr(hf, f"{name}Processor")
    video = "SmolVLMVideoProcessor"
    processor = (
        cls(images, tokenizer, **options)
        if kind == "idefics3"
        else processor_of(cls, images, tokenizer, video, **options)
    )
    write(folder, getattr(hf, f"{name}ForConditionalGeneration")(config), processor)


def idefics3(folder: Path) -> None:
    split_images("idefics3", folder)


def smolvlm(folder: Path) -> None:
    split_images("smolvlm", folder)


# ---------------------------------------------------------------- Gemma


def paligemma2(folder: Path) -> None:
    """A prompt that is read in both directions; no chat template."""
    tokenizer = gemma_tokenizer(["<image>"], "<unk>")
    images = hf.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)  # adds location tokens to the tokenizer
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config={**tiny.TEXT, **ids_of(tokenizer), "model_type": "gemma2", "head_dim": 16},
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
        vocab_size=len(tokenizer),
    )
    write(folder, hf.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> None:
    """Image tokens attend to each other in both directions; every other layer sees a window of 16 tokens."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    image = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = gemma_tokenizer([*turns, *image.values(), "<pad>"], "<pad>", extra_special_tokens=image)
    number = tokenizer.convert_tokens_to_ids
    config = hf.Gemma3Config(
        text_config={
            **tiny.TEXT,
            **ids_of(tokenizer),
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
        image_token_index=number("<image_soft_token>"),
    )
    images = hf.Gemma3ImageProcessorPil(size=SQUARE)
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA)
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.125)  # fresh ones are zero
    write(folder, model, processor, "<end_of_turn>")


# ---------------------------------------------------------------- InternVL


def internvl(folder: Path) -> None:
    """The native layout (InternVL3-...-hf): up to 4 tiles of 56 pixels and an overview, 4 tokens each."""
    image = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *image.values(), "<video>"]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", extra_special_tokens={**image, "video_token": "<video>"})
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.InternVLConfig(
        text_config={**tiny.TEXT, **ids_of(tokenizer), "model_type": "qwen2", "tie_word_embeddings": False},
        vision_config={**vision, "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = hf.GotOcr2ImageProcessorPil(
        size=SQUARE,
        crop_to_patches=True,
        min_patches=1,
        max_patches=4,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = processor_of(
        hf.InternVLProcessor,
        images,
        tokenizer,
        "InternVLVideoProcessor",
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    write(folder, hf.InternVLForConditionalGeneration(config), processor)


# ---------------------------------------------------------------- families that need nothing of their own


def qwen3_5(folder: Path) -> None:
    """A linear-attention layer for each one of full attention."""
    tokenizer = byte_tokenizer(tiny.QWEN_SPECIALS, "<|im_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = hf.Qwen3_5Config(
        text_config={
            **tiny.TEXT,
            **ids_of(tokenizer),
            "head_dim": 32,
            "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 256,
        },
        tie_word_embeddings=False,
        **qwen_vision(tokenizer),
    )
    processor = qwen_processor(hf.Qwen3VLProcessor, tokenizer, 16, "Qwen3VLVideoProcessor")
    write(folder, hf.Qwen3_5ForConditionalGeneration(config), processor)


def aya_vision(folder: Path) -> None:
    """Tiles with their numbers in the text, patches shuffled 2x2, a Cohere language model."""
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tiles = ["TILE_GLOBAL", *(f"TILE_{n}" for n in range(1, 13))]
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks, *tiles], "<|im_end|>")
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config={
            **tiny.TEXT,
            **ids_of(tokenizer),
            "model_type": "cohere2",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    images = hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = hf.AyaVisionProcessor(
        images, tokenizer, patch_size=14, img_size=56, downsample_factor=2, chat_template=chatml("<image>")
    )
    write(folder, hf.AyaVisionForConditionalGeneration(config), processor)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "idefics": idefics,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma2": paligemma2,
    "gemma3": gemma3,
    "internvl": internvl,
    "qwen3_5": qwen3_5,
    "aya_vision": aya_vision,
}
