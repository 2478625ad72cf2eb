"""The processor of the original InternVL2 checkpoints (`OpenGVLab/InternVL2-*`), built without running their code.

The InternLM2 sizes come with a sentencepiece tokenizer without a fast form: it is built here from the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.errors import ModelError
from vlmtune.prompt.image_only import image_only, torchvision_works

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
"""The system prompt that these checkpoints were trained with."""


CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>{{ '\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tokens_per_tile(original: dict[str, Any]) -> int:
    """Language-model tokens of one tile of 448x448 pixels: 256 in all released sizes."""
    vision = original["vision_config"]
    return int((vision["image_size"] // vision["patch_size"]) ** 2 * original["downsample_ratio"] ** 2)


def load_processor(path: str, **hub: Any) -> Any:
    """InternVLProcessor with the original's tiling, prompt and token ids.

    The repository's preprocessor_config.json describes a plain resize; what its code really does is in config.json.
    """
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor
    from transformers.configuration_utils import PreTrainedConfig

    original, _ = PreTrainedConfig.get_config_dict(path, **hub)
    size = original["vision_config"]["image_size"]
    images = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size},
        crop_to_patches=bool(original.get("dynamic_image_size", True)),
        min_patches=original.get("min_dynamic_patch", 1),
        max_patches=original.get("max_dynamic_patch", 12),
        image_mean=MEAN,
        image_std=DEVIATION,
    )
    tokenizer = load_tokenizer(path, original, **hub)
    options = {"image_seq_length": tokens_per_tile(original), "chat_template": CHAT_TEMPLATE}
    if torchvision_works():
        from transformers import InternVLVideoProcessor

        return InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), **options)
    return image_only(InternVLProcessor)(images, tokenizer, None, **options)


def load_tokenizer(path: str, original: dict[str, Any], **hub: Any) -> Any:
    """The checkpoint's tokenizer in a fast form, with the same ids, and with character offsets."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    if original["llm_config"]["architectures"][0] != "InternLM2ForCausalLM":
        return AutoTokenizer.from_pretrained(path, extra_special_tokens=IMAGE_TOKENS, **hub)
    files = {name: cached_file(path, name, **hub) for name in ("tokenizer.model", "tokenizer_config.json")}
    settings = json.loads(Path(str(files["tokenizer_config.json"])).read_text(encoding="utf-8"))
    added = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    backend = sentencepiece_backend(Path(str(files["tokenizer.model"])), added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens=IMAGE_TOKENS,
        model_max_length=settings.get("model_max_length", 8192),
    )


def sentencepiece_backend(file: Path, added: dict[int, dict[str, Any]]) -> Any:
    """A `tokenizers.Tokenizer` with the ids of the sentencepiece BPE in `file` and of the `added` tokens.

    `added`: id -> {content, special, ...} as in tokenizer_config.json. An added token may replace an unused piece, or
    follow the last one.
    """
    from tokenizers import AddedToken, normalizers, processors
    from transformers.convert_slow_tokenizer import SpmConverter, generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    if proto.trainer_spec.model_type != 2:
        raise ModelError(f"{file}: is not a BPE model, unlike InternLM2's tokenizer")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    names = [piece.piece for piece in proto.pieces]
    for number in sorted(added):
        names += [f"[UNUSED_{n}]" for n in range(len(names), number)]
        names[number : number + 1] = [added[number]["content"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    normal = {name: number for name, number in vocabulary.items() if name in scores}
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, generate_merges(normal, scores.items()))
    assert backend is not None
    if proto.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), backend.normalizer])
    tokens = [
        AddedToken(token["content"], special=token.get("special", False), normalized=False)
        for _, token in sorted(added.items())
    ]
    backend.add_special_tokens([token for token in tokens if token.special])
    backend.add_tokens([token for token in tokens if not token.special])
    bos = ("<s>", vocabulary["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend
