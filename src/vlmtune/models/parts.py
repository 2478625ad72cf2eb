"""One vocabulary for all families: which part of a vision-language model a weight belongs to.

`vision` is the image encoder, `projector` what maps its features into the language model (merger, resampler),
`cross_attention` layers inserted into the language model to look at images, `language` the decoder with its input
embedding, `head` the output embedding where it is not tied to the input's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmtune.data import fingerprint
from vlmtune.errors import ConfigError, ModelError

INSIDE_TOWER = ("merger", "deepstack_merger_list")
"""Names that families with the projector inside the vision tower (Qwen2-VL and later) give it."""
CROSS_ATTENTION = ("gated_cross_attn_layers",)


@dataclass(frozen=True)
class Parts:
    """Maps names to parts by the longest matching module prefix."""

    prefixes: dict[str, str]
    """Module name -> part."""
    head: str = ""
    """Module name of the output embedding, whether it is a part of its own or tied to the input's."""

    def of(self, name: str) -> str:
        """The part of a parameter or module, named as in the base model or in a PEFT model around it."""
        name = name.removeprefix("module.").removeprefix("base_model.model.")
        matching = [p for p in self.prefixes if name == p or name.startswith(p + ".") or p == ""]
        return self.prefixes[max(matching, key=len)]


def find_parts(model: Any) -> Parts:
    """Resolve the parts of a transformers model (on any device, `meta` too).

    Everything that is neither encoder, decoder nor head connects the two, and is the projector.
    Raises ModelError where the model names no image encoder.
    """
    names = {module: name for name, module in model.named_modules()}
    encoder, decoder, head = model.get_encoder(modality="image"), model.get_decoder(), model.get_output_embeddings()
    if encoder is model or encoder not in names:
        raise ModelError(f"{type(model).__name__} has no image encoder that transformers can name")
    tower, text = names[encoder], names[decoder]
    prefixes = {"": "projector", text: "language", tower: "vision"}
    prefixes |= {f"{tower}.{child}": "projector" for child in INSIDE_TOWER if hasattr(encoder, child)}
    if tower.startswith(text + "."):  # the decoder holds the tower (Idefics): its other children are named
        prefixes |= {f"{text}.{child}": "projector" for child in ("perceiver_resampler",) if hasattr(decoder, child)}
    prefixes |= {f"{text}.{child}": "cross_attention" for child in CROSS_ATTENTION if hasattr(decoder, child)}
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        prefixes[names[head]] = "language" if tied else "head"
    around = {name for name in _ancestors(tower) | _ancestors(text) if not f"{name}.".startswith(f"{text}.")}
    for name in names.values():  # quantization's skip list needs names, also of what only the rule above covers
        if name.rpartition(".")[0] in around and name not in around:
            prefixes.setdefault(name, "projector")
    return Parts(prefixes, names.get(head, ""))


def _ancestors(name: str) -> set[str]:
    """Names of the modules around a module, the whole model (``) included."""
    words = name.split(".")
    return {".".join(words[:n]) for n in range(len(words))}


def base_of(model: Any) -> Any:
    """The transformers model inside the wrapper of several ranks and a PEFT model, or the model itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_files(model: Any, path: str) -> str:
    """What identifies the weights of the base model that was opened from `path`: a folder or the id of a hub."""
    return fingerprint.model_files(path, getattr(base_of(model).config, "_commit_hash", None))


def count(parameter: nn.Parameter) -> int:
    """Weights in a parameter; a 4-bit one stores two in a byte and knows its real shape."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def is_quantized(parameter: nn.Parameter) -> bool:
    """True for a weight stored in fewer bits than it is computed in."""
    return hasattr(parameter, "quant_state") or not parameter.is_floating_point()


def summary(model: nn.Module, parts: Parts) -> dict[str, dict[str, int]]:
    """Weights per part: {part: {total, trainable, quantized}}, parts in the order of the data flow."""
    found: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        row = found.setdefault(parts.of(name), {"total": 0, "trainable": 0, "quantized": 0})
        row["total"] += count(parameter)
        row["trainable"] += count(parameter) if parameter.requires_grad else 0
        row["quantized"] += count(parameter) if is_quantized(parameter) else 0
    order = ["vision", "projector", "cross_attention", "language", "head"]
    return {part: found[part] for part in order if part in found}


def check_parts(model: nn.Module, parts: Parts, wanted: list[str], key: str) -> None:
    """Raise ConfigError where the model has no weight in a part that the config key `key` names."""
    there = {parts.of(name) for name, _ in model.named_parameters()}
    tied = " (its head is the input embedding, which is in language)" if parts.head else ""
    lost = [f"{part}: this model has no such part{tied * (part == 'head')}" for part in wanted if part not in there]
    if lost:
        raise ConfigError([f"{key}: {problem}" for problem in lost])


def modules_in(model: nn.Module, parts: Parts, wanted: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of the wanted parts."""
    for name, module in model.named_modules():
        if name and parts.of(name) in wanted:
            yield name, module


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices between the input and output embeddings: those that Muon is for."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = base_of(model).get_output_embeddings() if hasattr(base_of(model), "get_output_embeddings") else None
    ends |= {id(p) for p in head.parameters()} if head is not None else set()
    return {name for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in ends}
