"""The original InternVL2 checkpoints (`OpenGVLab/InternVL2-*`), opened as transformers' native InternVL.

Their repositories carry model code of their own, which transformers 5 runs into NaN, fused attention weights, and for
the InternLM2 sizes a sentencepiece tokenizer without a fast form. Nothing of that code runs here: `config.json`, the
tokenizer's files and the weights are read, and the weights are converted while they load.

Source of the layout: Chen et al. 2024, arXiv:2404.16821; Cai et al. 2024, arXiv:2403.17297 (fused `wqkv`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

from vlmtune.config.schema import ModelConfig
from vlmtune.errors import CheckpointError, ModelError
from vlmtune.prompt.hub import remote
from vlmtune.prompt.internvl2 import tokens_per_tile

MODEL_TYPE = "internvl_chat"


class InternVL2ForConditionalGeneration(InternVLForConditionalGeneration):  # type: ignore[misc]
    """The native model under a name of its own: the original layout is converted for it alone."""

    def save_pretrained(self, folder: Any, *, save_original_format: bool = False, **options: Any) -> None:
        """Natively unless asked otherwise: by default original weights would be written beside a native config."""
        super().save_pretrained(folder, save_original_format=save_original_format, **options)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["architectures"] = [InternVLForConditionalGeneration.__name__]  # a class that transformers has
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- config


def native_config(original: dict[str, Any], image_token_id: int) -> Any:
    """InternVLConfig of an original config.json. Raises ModelError for a variant that the native model can't be."""
    from transformers import InternVLConfig

    vision, text = original["vision_config"], original["llm_config"]
    size = original.get("force_image_size") or vision["image_size"]
    wanted = {
        "ps_version": (original.get("ps_version", "v1"), "v2"),
        "select_layer": (original.get("select_layer", -1), -1),
        "pad2square": (original.get("pad2square", False), False),
        "force_image_size": (size, vision["image_size"]),
    }
    wrong = [f"{key}={found!r} ({needed!r} is needed)" for key, (found, needed) in wanted.items() if found != needed]
    if wrong:
        raise ModelError(f"this InternVL2 variant can't be converted: {', '.join(wrong)}")
    return InternVLConfig(
        text_config=_text_config(text),
        vision_config={
            "image_size": [size, size],
            "patch_size": [vision["patch_size"]] * 2,
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "attention_dropout": vision.get("attention_dropout", 0.0),
            "projection_dropout": vision.get("dropout", 0.0),
            **_taken(vision, "hidden_size intermediate_size num_hidden_layers num_attention_heads norm_type"),
            **_taken(vision, "layer_norm_eps hidden_act initializer_range"),
        },
        image_token_id=image_token_id,
        image_seq_length=tokens_per_tile(original),
        downsample_ratio=original["downsample_ratio"],
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        architectures=["InternVLForConditionalGeneration"],
    )


def _text_config(text: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "InternLM2ForCausalLM": {"model_type": "llama", "attention_bias": bool(text.get("bias", False))},
        "LlamaForCausalLM": {"model_type": "llama"},
        "Qwen2ForCausalLM": {"model_type": "qwen2"},
    }
    name = text["architectures"][0]
    if name not in kinds:
        raise ModelError(f"InternVL2 with the language model {name} can't be converted; known: {', '.join(kinds)}")
    scaling = text.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("type", "default"), "rope_theta": text.get("rope_theta", 10000.0)}
    return {
        **_taken(text, "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"),
        **_taken(text, "num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps"),
        **_taken(text, "bos_token_id eos_token_id pad_token_id"),
        "rope_parameters": rope | ({"factor": scaling["factor"]} if scaling else {}),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        **kinds[name],
    }


def _taken(values: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: values[name] for name in names.split() if name in values}


# ---------------------------------------------------------------- weights


def split_wqkv(fused: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value weights of InternLM2's fused `wqkv` [(groups * (heads/groups + 2)) * head_dim, ...].

    Rows come group by group: the query heads that share a key, then that key head, then the value head.
    """
    queries = heads // groups
    size, rest = fused.shape[0] // (groups * (queries + 2)), fused.shape[1:]
    grouped = fused.reshape(groups, queries + 2, size, *rest)
    query, key, value = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
    return (
        query.reshape(heads * size, *rest).contiguous(),
        key.reshape(groups * size, *rest).contiguous(),
        value.reshape(groups * size, *rest).contiguous(),
    )


def join_wqkv(query: Tensor, key: Tensor, value: Tensor, heads: int, groups: int) -> Tensor:
    """Inverse of `split_wqkv`."""
    queries, size, rest = heads // groups, query.shape[0] // heads, query.shape[1:]
    grouped = torch.cat(
        [
            query.reshape(groups, queries, size, *rest),
            key.reshape(groups, 1, size, *rest),
            value.reshape(groups, 1, size, *rest),
        ],
        dim=1,
    )
    return grouped.reshape(-1, *rest).contiguous()


class SplitWqkv(ConversionOps):  # type: ignore[misc]
    """`split_wqkv` as transformers calls it while loading."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        [fused] = (_single(value) for value in input_dict.values())
        text = context["config"].get_text_config()
        split = split_wqkv(fused, text.num_attention_heads, text.num_key_value_heads)
        return dict(zip(target_patterns, split, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinWqkv()


class JoinWqkv(ConversionOps):  # type: ignore[misc]
    """`join_wqkv` as transformers calls it while saving in the original layout."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        text = context["config"].get_text_config()
        query, key, value = (_single(input_dict[pattern]) for pattern in source_patterns)
        joined = join_wqkv(query, key, value, text.num_attention_heads, text.num_key_value_heads)
        return {target_patterns[0]: joined}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitWqkv()


def _single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


RENAMED = {
    r"^language_model\.output\.": "lm_head.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_model\.": "model.vision_tower.",
    r"\.encoder\.layers\.": ".encoder.layer.",
    r"^mlp1\.0\.": "model.multi_modal_projector.layer_norm.",
    r"^mlp1\.1\.": "model.multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "model.multi_modal_projector.linear_2.",
    r"\.tok_embeddings\.": ".embed_tokens.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.class_embedding": ".cls_token",
    r"\.position_embedding": ".position_embeddings",
    r"\.patch_embedding\.": ".patch_embeddings.projection.",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.q_norm\.": ".attention.q_norm.",
    r"\.attn\.k_norm\.": ".attention.k_norm.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.ls1": ".lambda_1",
    r"\.ls2": ".lambda_2",
}
"""Patterns of original names -> native ones."""


@functools.cache
def register() -> None:
    """Tell transformers how the original layout maps to `InternVL2ForConditionalGeneration`, once."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    def projections(block: str) -> list[str]:
        return [f"{block}.{name}_proj" for name in "qkv"]

    fused = [
        WeightConverter("attn.qkv", projections("attention"), [Chunk(dim=0)]),
        WeightConverter("attention.wqkv", projections("self_attn"), [SplitWqkv()]),
    ]
    renamed = [WeightRenaming(original, native) for original, native in RENAMED.items()]
    register_checkpoint_conversion_mapping(InternVL2ForConditionalGeneration.__name__, [*renamed, *fused])


WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def source_files(config: ModelConfig) -> str:
    """The folder with the files of an original checkpoint, fetched where it is on a hub; its weights may be missing."""
    from huggingface_hub import snapshot_download

    path = str(config.path)
    return path if Path(path).is_dir() else snapshot_download(path, ignore_patterns=list(WEIGHTS), **remote(config))


def save_original(model: Any, config: ModelConfig, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a whole model, or its tensors `state`, in the layout of the checkpoint that `config` opened: fused weights
    under their original names, and every file of the checkpoint but its weights, so that what reads the original reads
    this.

    The files are opened again and compared. Raises CheckpointError where they differ.
    """
    import shutil

    state = model.state_dict() if state is None else state
    model.save_pretrained(folder, state_dict=dict(state), save_original_format=True)
    shutil.copytree(source_files(config), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*WEIGHTS, ".*"))
    again = InternVL2ForConditionalGeneration.from_pretrained(folder, config=model.config, dtype=model.dtype)
    written = again.state_dict()
    lost = [n for n, t in state.items() if n not in written or not torch.equal(written[n], t.cpu())]
    if lost:
        raise CheckpointError(f"{folder}: the saved files do not hold the trained value of {lost[0]}")


# ---------------------------------------------------------------- processor
