"""Counts the memory of one forward and backward pass of a language model, without its numbers: torch's fake tensors
have shapes, types and lifetimes but no data, so a 7B is counted on a laptop. Sizes as on a GPU under bf16 autocast.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from gpu_work import Shape, model_config
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2VLForConditionalGeneration

IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Living(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return, for as long as each lives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        own = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
        self.known: dict[int, Any] = {storage._cdata: storage for storage in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self.known.pop(place, None)

        self.known[place] = weakref.ref(storage, gone)
        self.now += size


def peak(shape: Shape, tokens: int, *, checkpointing: bool, supervised: int = 20, rank: int = 16) -> int:
    """Bytes at the peak of a pass of `tokens` tokens with LoRA over bf16 weights, besides the weights; with LoRA's
    gradients.
    """
    model = built(shape, rank)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model.train())
        base = model.get_base_model()
        with Living(model) as living:
            embedded = torch.zeros(1, tokens, shape.hidden, dtype=torch.bfloat16)
            places = torch.arange(tokens).expand(3, 1, tokens)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = base.model.language_model(inputs_embeds=embedded, position_ids=places, use_cache=False)[0]
                logits = base.lm_head(hidden[0, -supervised:]).float()
                loss = F.cross_entropy(logits, torch.zeros(supervised, dtype=torch.long))
            loss.backward()
    return living.peak


def built(shape: Shape, rank: int) -> Any:
    """The model with LoRA on its decoder, on the meta device."""
    config = model_config(shape, IDS, end=1)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))


def fill(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of those on the meta device."""
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
