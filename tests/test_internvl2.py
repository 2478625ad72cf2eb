"""Original InternVL2 checkpoints: weights, tiles, prompts and ids as their own code has them, without running it."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ConfigError, ModelError
from vlmtune.models import internvl2
from vlmtune.models.load import load
from vlmtune.prompt import internvl2 as originals
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.processors import load_processor
from vlmtune.training.model_folder import save_model

HEADS, GROUPS, WIDTH, VISION, LAYERS, DEPTH = 8, 2, 128, 64, 2, 3
ORIGINAL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 56,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": GROUPS,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": VISION,
        "image_size": 56,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": 4,
        "num_hidden_layers": DEPTH,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}
ADDED = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
SENTENCES = [*tiny.CORPUS, "The quick brown fox jumps over the lazy dog.", "yes no maybe: 0 1 2 3 4 5 6 7 8 9"] * 20


# ---------------------------------------------------------------- a checkpoint as its authors publish them


def sentencepiece_model(folder: Path, *, dummy_prefix: bool) -> Any:
    """Train tokenizer.model and write it with a tokenizer_config.json; returns sentencepiece's own processor."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    basic = {0: "<unk>", 1: "<s>", 2: "</s>"}
    added = basic | {420 + n: token for n, token in enumerate(ADDED)}
    decoder = {
        str(n): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for n, t in added.items()
    }
    settings = {"added_tokens_decoder": decoder, "tokenizer_class": "InternLM2Tokenizer", "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def original_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the original names and shapes."""
    made: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        made[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        if bias:
            made[f"{name}.bias"] = torch.randn(shape[0]) * 0.1

    def norm(name: str, width: int, bias: bool = True) -> None:
        made[f"{name}.weight"] = 1 + torch.randn(width) * 0.1
        if bias:
            made[f"{name}.bias"] = torch.randn(width) * 0.1

    made["vision_model.embeddings.class_embedding"] = torch.randn(1, 1, VISION)
    made["vision_model.embeddings.position_embedding"] = torch.randn(1, 17, VISION)
    layer("vision_model.embeddings.patch_embedding", VISION, 3, 14, 14)
    for n in range(DEPTH):
        block = f"vision_model.encoder.layers.{n}"
        layer(f"{block}.attn.qkv", 3 * VISION, VISION)
        layer(f"{block}.attn.proj", VISION, VISION)
        layer(f"{block}.mlp.fc1", 128, VISION)
        layer(f"{block}.mlp.fc2", VISION, 128)
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        made[f"{block}.ls1"], made[f"{block}.ls2"] = torch.randn(VISION), torch.randn(VISION)
    norm("mlp1.0", 4 * VISION)
    layer("mlp1.1", WIDTH, 4 * VISION)
    layer("mlp1.3", WIDTH, WIDTH)
    vocabulary, size = config["llm_config"]["vocab_size"], WIDTH // HEADS
    made["language_model.model.tok_embeddings.weight"] = torch.randn(vocabulary, WIDTH)
    for n in range(LAYERS):
        block = f"language_model.model.layers.{n}"
        layer(f"{block}.attention.wqkv", (HEADS + 2 * GROUPS) * size, WIDTH, bias=False)
        layer(f"{block}.attention.wo", WIDTH, WIDTH, bias=False)
        for name, shape in {"w1": (256, WIDTH), "w3": (256, WIDTH), "w2": (WIDTH, 256)}.items():
            layer(f"{block}.feed_forward.{name}", *shape, bias=False)
        norm(f"{block}.attention_norm", WIDTH, bias=False)
        norm(f"{block}.ffn_norm", WIDTH, bias=False)
    norm("language_model.model.norm", WIDTH, bias=False)
    layer("language_model.output", vocabulary, WIDTH, bias=False)
    return made


def publish(folder: Path, *, dummy_prefix: bool = False, **changed: Any) -> Path:
    config = copy.deepcopy(ORIGINAL) | changed
    config["llm_config"]["vocab_size"] = 420 + len(ADDED) + 1
    sentencepiece_model(folder, dummy_prefix=dummy_prefix)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(original_weights(config), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("internvl2"))


def opened(folder: Path, **quantization: Any) -> tuple[Any, Any]:
    dtypes = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    model, processor = load(ModelConfig(path=str(folder)), tiny.method(quantization), **dtypes)
    return model.eval(), processor


# ---------------------------------------------------------------- weights


def test_round_trip_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    model, _ = opened(folder)
    internvl2.save_original(model, ModelConfig(path=str(folder)), tmp_path)
    wanted, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internvl_chat"
    again, _ = opened(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_saved_natively_it_opens_with_transformers_alone(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model, processor = opened(folder)
    save_model(model, processor, tmp_path / "model")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(plain).__name__ == "InternVLForConditionalGeneration"
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    encoder, again = (Encoder(p) for p in (processor, load_processor(ModelConfig(path=str(tmp_path / "model")))))
    row = tiny.record(images=[tiny.image(100, 60)])
    assert encoder.encode([row], answered=True).input_ids == again.encode([row], answered=True).input_ids


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_quantizes_while_it_converts(folder: Path, kind: str) -> None:
    from vlmtune.models.parts import find_parts, is_quantized

    model, _ = opened(folder, **tiny.QUANTIZED[kind])
    names = {name for name, p in model.named_parameters() if is_quantized(p)}
    assert len(names) == 7 * LAYERS
    assert {find_parts(model).of(name) for name in names} == {"language"}


def test_split_and_join_are_inverse() -> None:
    fused = torch.randn((HEADS + 2 * GROUPS) * 4, 6)
    query, key, value = internvl2.split_wqkv(fused, HEADS, GROUPS)
    assert [len(t) for t in (query, key, value)] == [HEADS * 4, GROUPS * 4, GROUPS * 4]
    assert torch.equal(internvl2.join_wqkv(query, key, value, HEADS, GROUPS), fused)
    assert torch.equal(query[:4], fused[:4])
    assert torch.equal(key[:4], fused[16:20]), "after the four query heads of the first group"
    assert torch.equal(value[:4], fused[20:24])


def test_a_run_saves_the_layout_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(folder, model={"save_layout": "original"})
    run = tiny.assemble(config, tiny.records(4)).fit()
    save_model(run.model, run.processor, tmp_path / "model", config.model)
    again, _ = opened(tmp_path / "model")
    assert "language_model.model.layers.0.attention.wqkv.weight" in load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(again.get_parameter(name), p) for name, p in run.model.named_parameters())


def test_other_checkpoints_have_no_original_layout(checkpoint_of: Any) -> None:
    with pytest.raises(ConfigError, match="is not an InternVL2 checkpoint in its original layout"):
        tiny.assemble(tiny.config(checkpoint_of("internvl"), model={"save_layout": "original"}), tiny.records(4))


# ---------------------------------------------------------------- logits, computed anew from the fused layout


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def rms_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[heads, tokens, size] each."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def seen(w: dict[str, Tensor], tiles: Tensor) -> Tensor:
    """Tiles [N, 3, 56, 56] -> features [N * 4, D]: the vision transformer, then 2x2 patches shuffled into one."""
    conv = "vision_model.embeddings.patch_embedding"
    x = F.conv2d(tiles, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["vision_model.embeddings.class_embedding"].expand(len(x), -1, -1), x], 1)
    x = x + w["vision_model.embeddings.position_embedding"]
    for n in range(DEPTH):
        block = f"vision_model.encoder.layers.{n}"
        qkv = linear(layer_norm(x, w, f"{block}.norm1"), w, f"{block}.attn.qkv")
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        x = x + linear(attend(q, k, v).transpose(1, 2).flatten(2), w, f"{block}.attn.proj") * w[f"{block}.ls1"]
        hidden = F.gelu(linear(layer_norm(x, w, f"{block}.norm2"), w, f"{block}.mlp.fc1"))
        x = x + linear(hidden, w, f"{block}.mlp.fc2") * w[f"{block}.ls2"]
    grid = x[:, 1:].unflatten(1, (4, 4))  # [N, row, column, D]
    halves = grid.reshape(len(x), 4, 2, 2 * VISION).permute(0, 2, 1, 3).reshape(len(x), 2, 2, 4 * VISION)
    shuffled = halves.permute(0, 2, 1, 3).reshape(-1, 4 * VISION)
    return linear(F.gelu(linear(layer_norm(shuffled, w, "mlp1.0"), w, "mlp1.1")), w, "mlp1.3")


def rotated(x: Tensor) -> Tensor:
    """[heads, tokens, size] turned by its position, halves paired."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 1e6 ** (-torch.arange(0, size, 2) / size)
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def computed(w: dict[str, Tensor], ids: Tensor, tiles: Tensor, image_id: int) -> Tensor:
    """Logits [T, V] of one sequence, straight from the original weights."""
    x = w["language_model.model.tok_embeddings.weight"][ids].clone()
    x[ids == image_id] = seen(w, tiles)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for n in range(LAYERS):
        block = f"language_model.model.layers.{n}"
        qkv = linear(rms_norm(x, w, f"{block}.attention_norm"), w, f"{block}.attention.wqkv")
        grouped = qkv.unflatten(-1, (GROUPS, HEADS // GROUPS + 2, -1))  # [T, group, queries + key + value, size]
        q = rotated(grouped[:, :, :-2].flatten(1, 2).transpose(0, 1))
        k, v = (grouped[:, :, n].transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0) for n in (-2, -1))
        mixed = attend(q, rotated(k), v, causal).transpose(0, 1).flatten(1)
        x = x + linear(mixed, w, f"{block}.attention.wo")
        h, ffn = rms_norm(x, w, f"{block}.ffn_norm"), f"{block}.feed_forward"
        x = x + linear(F.silu(linear(h, w, f"{ffn}.w1")) * linear(h, w, f"{ffn}.w3"), w, f"{ffn}.w2")
    return linear(rms_norm(x, w, "language_model.model.norm"), w, "language_model.output")


def test_logits_are_those_of_the_fused_layout(folder: Path) -> None:
    model, processor = opened(folder)
    batch = padded(Encoder(processor), [tiny.record("What color?", "Red", [tiny.image(100, 60), tiny.image()])])
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        found = model(**model_inputs(model, batch)).logits[0]
        wanted = computed(weights, batch.input_ids[0], batch.inputs["pixel_values"], model.config.image_token_id)
    assert len(batch.inputs["pixel_values"]) > 2
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- tiles


def tiles_by_definition(width: int, height: int, most: int) -> tuple[int, int]:
    """Columns and rows: the nearest aspect ratio of all grids of 1 to `most` tiles, in the order of their area; of
    equal ones the later, where the image has more than half the pixels of its tiles."""
    grids = sorted(
        {(c, r) for c, r in itertools.product(range(1, most + 1), repeat=2) if c * r <= most}, key=lambda g: g[0] * g[1]
    )
    best, gap = (1, 1), math.inf
    for columns, rows in grids:
        off = abs(width / height - columns / rows)
        if off < gap or (off == gap and width * height > 0.5 * 56 * 56 * columns * rows):
            best, gap = (columns, rows), min(off, gap)
    return best


def test_tiling_is_the_definition_on_2000_sizes(folder: Path) -> None:
    import random

    images = load_processor(ModelConfig(path=str(folder))).image_processor
    rng = random.Random(0)
    for _ in range(2000):
        width, height = rng.randint(1, 2000), rng.randint(1, 2000)
        columns, rows = tiles_by_definition(width, height, 12)
        expected = columns * rows + (columns * rows > 1)
        assert images.get_number_of_image_patches(height, width, {}) == expected, (width, height)


def test_an_image_is_its_tiles_and_an_overview(folder: Path) -> None:
    processor = load_processor(ModelConfig(path=str(folder)))
    picture = tiny.image(112, 56)
    tiles = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert len(tiles) == 3
    whole = processor.image_processor(picture.resize((56, 56)), return_tensors="pt", crop_to_patches=False)
    left = processor.image_processor(picture.crop((0, 0, 56, 56)), return_tensors="pt", crop_to_patches=False)
    torch.testing.assert_close(tiles[0], left["pixel_values"][0], rtol=0, atol=0)
    assert (tiles[2] - whole["pixel_values"][0]).abs().mean() < 0.2


# ---------------------------------------------------------------- tokenizer and prompt


TEXTS = ["What color is it?", "  two  spaces ", "\nline\n\nbreaks", "😀 赤い é", "a<b", "", " ", "The quick brown fox."]


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_ids_and_offsets_are_sentencepieces(tmp_path: Path, dummy_prefix: bool) -> None:
    own = sentencepiece_model(tmp_path, dummy_prefix=dummy_prefix)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    tokenizer = originals.load_tokenizer(str(tmp_path), ORIGINAL)
    for text in TEXTS:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"] == own.encode(text), text
        covered = {n for begin, end in found["offset_mapping"] for n in range(begin, end)}
        assert covered == set(range(len(text))), text
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert [tokenizer.convert_tokens_to_ids(token) for token in ADDED] == [*range(420, 420 + len(ADDED))]
    ids = tokenizer("x<|im_end|><IMG_CONTEXT>", add_special_tokens=False)["input_ids"]
    assert ids[-2:] == [420, 424]
    assert tokenizer.decode(tokenizer("two words", add_special_tokens=False)["input_ids"]).strip() == "two words"


def test_an_added_token_may_take_an_unused_pieces_place(tmp_path: Path) -> None:
    """As in the real file, whose 92542nd piece is `[UNUSED_TOKEN_145]` and whose 92542nd token is `<|im_end|>`."""
    own = sentencepiece_model(tmp_path, dummy_prefix=False)
    backend = originals.sentencepiece_backend(
        tmp_path / "tokenizer.model", {419: {"content": "<|im_end|>", "special": True}}
    )
    assert backend.token_to_id("<|im_end|>") == 419
    assert backend.token_to_id(own.id_to_piece(419)) is None
    assert backend.get_vocab_size() == 420


def test_the_prompt_is_the_originals(folder: Path) -> None:
    """Its conversation: `<s>`, system, user, assistant; `<|im_end|>` follows each without a line break."""
    encoder = Encoder(load_processor(ModelConfig(path=str(folder))))
    text, [(begin, end)] = encoder.render(
        tiny.record("What color?", "Red"), answered=True, expansions=["<img><IMG_CONTEXT></img>"]
    )
    assert text == (
        f"<s><|im_start|>system\n{originals.SYSTEM}<|im_end|><|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat color?"
        "<|im_end|><|im_start|>assistant\nRed<|im_end|>"
    )
    assert text[begin:end] == "Red<|im_end|>"
    ids = encoder.encode([tiny.record("What color?", "Red", [tiny.image(100, 60)])], answered=True).input_ids[0]
    assert ids[0] == 1
    assert 1 not in ids[1:]
    assert encoder.answers.end_ids == [2, 420]


def test_the_models_own_system_prompt_can_be_replaced(folder: Path) -> None:
    encoder = Encoder(load_processor(ModelConfig(path=str(folder))), system_prompt="Be brief.")
    assert encoder.render(tiny.record(), answered=True)[0].startswith("<s><|im_start|>system\nBe brief.<|im_end|>")


# ---------------------------------------------------------------- siblings on Qwen2


@pytest.fixture(scope="module")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As InternVL2-1B: a Qwen2 language model under its usual names, and Qwen2's tokenizer files."""
    folder = tmp_path_factory.mktemp("internvl2_1b")
    backend = tiny.byte_bpe([])
    backend.model.save(str(folder))
    size = backend.get_vocab_size()
    added = {size + n: token for n, token in enumerate(["<|endoftext|>", *ADDED])}
    same = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(n): {"content": t, **same} for n, t in added.items()},
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = copy.deepcopy(ORIGINAL)
    llm = config["llm_config"]
    llm |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": size + len(added) + 1}
    llm |= {"rope_scaling": None, "eos_token_id": size + 1, "bos_token_id": size, "pad_token_id": size}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {n: t for n, t in original_weights(config).items() if not n.startswith("language_model")}
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = {k: v for k, v in llm.items() if k not in ("architectures", "bias", "rope_scaling")}
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    weights |= {f"language_model.{name}": t for name, t in language.state_dict().items()}
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_sibling_on_qwen2_opens_and_goes_back(sibling: Path, tmp_path: Path) -> None:
    model, processor = opened(sibling)
    assert type(model.get_decoder()).__name__ == "Qwen2Model"
    assert model.get_decoder().layers[0].self_attn.q_proj.bias is not None
    internvl2.save_original(model, ModelConfig(path=str(sibling)), tmp_path)
    wanted, found = load_file(sibling / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    encoder = Encoder(processor)
    text, _ = encoder.render(tiny.record("What color?", "Red"), answered=True, expansions=[""])
    assert text.startswith("<|im_start|>system\n"), "Qwen2's tokenizer has no token that begins a text"
    row = tiny.record("What color?", "Red", [tiny.image(100, 60)])
    batch = padded(encoder, [row])
    assert encoder.tokenizer.decode(batch.labels[0][batch.labels[0] >= 0]) == "Red<|im_end|>"
    with torch.no_grad():
        assert torch.isfinite(model(**model_inputs(model, batch)).logits).all()


# ---------------------------------------------------------------- training, and what is refused


def test_lora_trains_and_comes_back(folder: Path, tmp_path: Path) -> None:
    from vlmtune.models.load import load_trained

    config = tiny.config(folder, adapter=tiny.LORA, learning_rate=1e-2, scheduler=tiny.CONSTANT)
    rows = tiny.records(4)
    run = tiny.assemble(config, rows).fit()
    assert run.losses[-1] < run.losses[0]
    save_model(run.model, run.processor, tmp_path / "model")
    fp32 = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    again, _ = load_trained(tmp_path, config, **fp32)
    batch = padded(run.encoder, rows)
    with torch.no_grad():
        ours, theirs = (m.eval()(**model_inputs(m, batch)).logits for m in (run.model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changed", [{"ps_version": "v1"}, {"select_layer": -4}, {"pad2square": True}, {"force_image_size": 448}]
)
def test_variants_that_would_compute_something_else_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(changed))):
        internvl2.native_config(ORIGINAL | changed, 424)


def test_an_unknown_language_model_is_refused() -> None:
    other = {**ORIGINAL["llm_config"], "architectures": ["Phi3ForCausalLM"]}
    with pytest.raises(ModelError, match="Phi3ForCausalLM can't be converted; known: InternLM2ForCausalLM"):
        internvl2.native_config(ORIGINAL | {"llm_config": other}, 424)
