"""Vision-language models of 0.3 million random weights in the hub's layout, and small rows to train them on.

One function per family writes a complete checkpoint; `FAMILIES` names them. Geometry is real in kind (patch merging,
multimodal positions, a class token) and tiny in size. Weights are drawn wide enough that a wrong mask, position or
image shows up in the loss.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from vlmtune import run
from vlmtune.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    GenerationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TaskConfig,
    TrackerConfig,
    TrainerConfig,
)
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import RecordList, Split
from vlmtune.launch import session
from vlmtune.models.parts import Parts
from vlmtune.models.peft_config import peft_config
from vlmtune.models.targets import narrow
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.image_only import image_only
from vlmtune.record.progress import Progress
from vlmtune.training import Setup, attempts, loop
from vlmtune.training.loop import StepReport

# ---------------------------------------------------------------- tokenizers

CORPUS = [
    "What color is the large shape in the picture? Red, green or blue.",
    "How many circles are there? There are three small circles.",
    "Is a triangle above the square? yes no left right",
    "You are a helpful assistant. system user assistant",
    "USER: ASSISTANT: [INST] [/INST] 0123456789",
    "one\n\ntwo\n\nthree\n",  # a pair of newlines is one token, as in real vocabularies
] * 10
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_WORDS = (  # newlines in a row are one word, so that an answer's may merge with the prompt's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (  # writes no </s> after an answer, as the public llava-1.5 template
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def byte_bpe(specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE, as Qwen has it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return bpe


def sentencepiece_bpe(
    specials: Sequence[str], *, base: Sequence[str] = ("<unk>", "<s>", "</s>"), prefix: bool = True
) -> Tokenizer:
    """A BPE as converted from Llama's SentencePiece: a word mark in place of spaces, bytes for unknown letters, <s>.

    Without `prefix` as Gemma's: no mark in front of the text, and nothing added to it.
    """
    bpe = Tokenizer(models.BPE(unk_token=base[0], byte_fallback=True, fuse_unk=True))
    marks = [normalizers.Replace(" ", "▁")]
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *marks] if prefix else marks)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)] if prefix else spaces)
    words = [word if prefix else f" {word}" for line in CORPUS for word in line.split()]
    letters = [*base, *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=450, special_tokens=letters, show_progress=False))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*base, *specials]])
    if prefix:
        bos = base[1]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return bpe


# ---------------------------------------------------------------- families

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}


def qwen2_vl(folder: Path, *, tied: bool = False) -> None:
    """Patches of 14 merged by 2x2, images of any shape from 28x28 to about 112x112, positions on three axes."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(QWEN_SPECIALS), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    number = tokenizer.convert_tokens_to_ids
    end, pad = number("<|im_end|>"), number("<|endoftext|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": TEXT["hidden_size"], "num_heads": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, **ids, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2},
        tie_word_embeddings=tied,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 16 * 28**2}
    )
    processor = image_only(hf.Qwen2VLProcessor)(images, tokenizer, None, chat_template=CHATML)
    write(folder, hf.Qwen2VLForConditionalGeneration(config), processor, end, pad)


def llava(folder: Path) -> None:
    """LLaVA 1.5: CLIP's second last layer without the class token, 16 tokens for each image of 56x56."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_bpe(["<image>", "<pad>"]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": end, "pad_token_id": pad}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    features = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    config = hf.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 64,
            **vision,
        },
        text_config={**TEXT, **ids, "model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **features,
    )
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    write(folder, hf.LlavaForConditionalGeneration(config), processor, end, pad)


def qwen2_vl_tied(folder: Path) -> None:
    """As the small Qwen2-VL checkpoints: one matrix is input and output embedding."""
    qwen2_vl(folder, tied=True)


FAMILIES: dict[str, Callable[[Path], None]] = {"qwen2_vl": qwen2_vl, "llava": llava}
VARIANTS: dict[str, Callable[[Path], None]] = {"qwen2_vl_tied": qwen2_vl_tied}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny checkpoint `name` into `folder`. The same seed gives the same weights."""
    import tiny_families

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (FAMILIES | VARIANTS | tiny_families.FAMILIES)[name](folder)
    return folder


def write(folder: Path, model: Any, processor: Any, end: int, pad: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    model.generation_config = hf.GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---------------------------------------------------------------- rows


def image(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
    """Noise with one plain corner, different for each seed."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def record(
    question: str = "What color?",
    answer: str | None = "Red",
    images: Sequence[Image.Image] | None = None,
    group: Any = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> Record:
    """A row about `images` (one by default), after the turns `earlier`. `answer=None`: a prompt without one."""
    turns = [Turn(q, (a,)) for q, a in earlier] + [Turn(question, () if answer is None else (answer,))]
    return Record(tuple(turns), tuple([image()] if images is None else images), group)


WORDS = ("Red", "three small circles", "yes", "There are three green shapes above the large blue square.", "no", "42")


def records(count: int, *, per_image: int = 1, sizes: Sequence[tuple[int, int]] = ((56, 56),)) -> list[Record]:
    """Rows with answers of very different lengths; `per_image` rows in a row ask about one image."""
    rows = []
    for number in range(count):
        picture = number // per_image
        width, height = sizes[picture % len(sizes)]
        question = ("What color is it?", "How many circles are there in the picture?", "Is it red?")[number % 3]
        rows.append(
            record(question, WORDS[number % len(WORDS)], [image(width, height, picture)], group=f"image {picture}")
        )
    return rows


def write_csv(folder: Path, rows: Iterable[tuple[str, str]], *, per_image: int = 1, name: str = "rows.csv") -> Path:
    """A table of (question, answer) `rows` with image files beside it."""
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "question", "answer"])
        for number, (question, answer) in enumerate(rows):
            picture = folder / f"{number // per_image}.png"
            if not picture.exists():
                image(seed=number // per_image).save(picture)
            writer.writerow([picture.name, question, answer])
    return path


# ---------------------------------------------------------------- adapters


def targets(model: Any, parts: Parts, wanted: Any, scope: list[str]) -> list[str]:
    """Full names of the modules that LoRA takes for `target_modules=wanted` in the parts `scope`."""
    config = peft_config("lora", {"target_modules": wanted})
    narrow(config, model, parts, scope)
    return sorted(config.target_modules)


# ---------------------------------------------------------------- runs

CONSTANT = SchedulerConfig("constant", 0.0)
LORA = {"method": "lora", "parts": ["language"], "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NONE: dict[str, Any] = {"method": None, "parts": ["language"]}
QUANTIZED: dict[str, dict[str, Any]] = {
    kind: {
        "method": "bitsandbytes_4bit",
        "parts": ["language"],
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": None,
    }
    for kind in ("nf4", "fp4")
} | {"int8": {"method": "bitsandbytes_8bit", "parts": ["language"], "load_in_8bit": True, "llm_int8_threshold": 6.0}}


def method(keys: dict[str, Any]) -> MethodConfig:
    """`adapter` or `quantization` from its keys as YAML has them."""
    rest = {key: value for key, value in keys.items() if key not in ("method", "parts")}
    return MethodConfig(keys.get("method"), list(keys.get("parts", ["language"])), rest)


def adapter_method(keys: dict[str, Any]) -> AdapterConfig:
    """`adapter` from its keys as YAML has them."""
    own = {key: value for key, value in keys.items() if key != "from"}
    return AdapterConfig(**vars(method(own)), from_=keys.get("from"))


def config(
    path: Path | str | None,
    *,
    adapter: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    **trainer: Any,
) -> Config:
    """A run's config: full fine-tuning of the model in `path` in fp32 unless said otherwise; `trainer` are its keys."""
    steps = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "num_workers": 0}
    steps |= {"eval_every": None, "save_every": None, **trainer}
    return Config(
        ModelConfig(path=None if path is None else str(path), **(model or {})),
        adapter_method(adapter or {}),
        method(quantization or {}),
        TrainerConfig(**steps),
        DataConfig(),
        OptimizerConfig(**(optimizer or {})),
        TaskConfig(),
        GenerationConfig(**(generation or {"max_new_tokens": 8})),
        TrackerConfig(name="none"),
    )


@dataclass
class Run(Setup):
    """What `run.build` makes, without files, evaluation and logs."""

    progress: Progress = field(default_factory=Progress)
    reports: list[StepReport] = field(default_factory=list)

    def fit(self, *, stop_after: int | None = None, **hooks: Any) -> Run:
        """Train from `progress` on, to the end or until step `stop_after` is done."""
        own = loop.Hooks(
            before_step=partial(session.seed_step, self.config.trainer.seed, self.engine),
            after_step=(self.reports.append,),
            stop=lambda: self.progress.step == stop_after,
            **hooks,
        )
        attempts.fit(self, self.progress, own, summed_loss)
        return self

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of all parameters."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def assemble(config: Config, rows: Sequence[Record]) -> Run:
    """Build everything that training `rows` under `config` needs."""
    made = run.build(config, {"train": Split(RecordList(rows))}, None)
    return Run(**vars(made), progress=Progress(first_total=made.loader.total_steps))
