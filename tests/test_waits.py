"""How often a step waits for the device: what a CPU can count of it.

On a GPU, reading a value back stops the processor until all queued work is done. Here each such operation is counted,
and where it comes from. Tensors that stay on the CPU by design (`Batch.on_host`), and what is computed from them alone,
don't count.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from vlmtune.batching.layout import Batch, padded, shared
from vlmtune.batching.preparation import Preparation
from vlmtune.objectives import next_token
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item, int, float, bool
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PACKAGES = {
    name: Path(str(importlib.util.find_spec(name).origin)).parent  # type: ignore[union-attr]
    for name in ("vlmtune", "transformers", "peft", "accelerate")
}
"""Their folders: the name alone may be that of the checkout too."""


class Waits(TorchDispatchMode):
    """Counts what would wait for the device, by package, file and function."""

    def __init__(self, on_host: Iterable[Tensor]):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on_host = {address(tensor): tensor for tensor in on_host}  # kept, so that no address is used again

    def __enter__(self) -> Waits:
        self.tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            if address(tensor) not in self.on_host:
                self.found[caller()] += 1
            return self.tolist(tensor)

        Tensor.tolist = counted
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tensor.tolist = self.tolist

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = bool(tensors) and all(address(tensor) in self.on_host for tensor in tensors)
        if not here and (func in READS or (func in INDEXES and by_mask(args[1]))):
            self.found[caller()] += 1
        out = func(*args, **(kwargs or {}))
        if here:
            self.on_host |= {address(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def by_mask(indexes: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indexes)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def caller() -> str:
    """The innermost function of a package other than torch; `elsewhere` in a backward pass of the test's own."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        for package, folder in PACKAGES.items():
            if folder in file.parents:
                return f"{package} {file.name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


CHECKS = {
    "transformers import_utils.py torch_compilable_check": 1,  # as many image tokens as features
    "transformers modeling_{}.py get_placeholder_mask": 1,  # the message for when they differ
}
MASK = {"transformers masking_utils.py _ignore_causal_mask_sdpa": 2}
"""Whether there is any padding; not asked about the mask of the shared layout."""
OWN = {
    "qwen3_vl": {  # boolean indexes of image tokens in two layers
        "transformers modeling_qwen3_vl.py _deepstack_process": 2,
        "elsewhere": 3,  # and their backward pass
    },
    "qwen3_5": {"transformers masking_utils.py create_recurrent_attention_mask": 1},
}
LAYOUTS = [
    *((family, padded) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava")),
    *((family, shared) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")),
]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_a_pass_waits_for_what_transformers_reads(
    family: str,
    layout: Callable[..., Batch],
    encoder_of: Callable[[str], Encoder],
    model_of: Callable[[str], Any],
) -> None:
    """None of it is ours, and none grows with rows, images or layers (but Qwen3-VL's)."""
    model = model_of(family)
    rows = tiny.records(6, per_image=3, sizes=((56, 56), (112, 56)))
    batch = Preparation.of(model, Accelerator(cpu=True))(layout(encoder_of(family), rows))
    with Waits(batch.inputs[name] for name in batch.on_host) as counter:
        summed_loss(model, batch.to(torch.device("cpu"))).backward()
    checks = {place.format(family): count for place, count in CHECKS.items()}
    assert counter.found == {**checks, **(MASK if layout is padded else {}), **OWN.get(family, {})}


@pytest.mark.parametrize("width", [None, 3], ids=["at once", "in chunks"])
def test_a_step_waits_once(
    width: int | None, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For loss, norm and counts together, however many micro-batches it has."""
    config = tiny.config(checkpoint_of("llava"), adapter=tiny.LORA, max_steps=2, gradient_accumulation_steps=3)
    run = tiny.assemble(config, tiny.records(24))
    if width is not None:
        monkeypatch.setattr(next_token, "MOST_LOGITS", width * len(run.processor.tokenizer))
    batches, _ = list(run.loader.micro_batches()), run.loader.expected_tokens
    monkeypatch.setattr(run.loader, "micro_batches", lambda step: batches)
    with Waits(()) as counter:
        run.fit()
    ours = {place: count for place, count in counter.found.items() if not place.startswith("transformers")}
    assert len(batches) == 6
    assert ours == {"vlmtune loop.py _read": 2}


def test_a_batch_is_counted_once(encoder_of: Callable[[str], Encoder]) -> None:
    """Counting it again on the device would wait for it."""
    batch = padded(encoder_of("llava"), tiny.records(2))
    with Waits(()) as counter:
        moved = batch.to(torch.device("cpu"))
        assert (moved.supervised, moved.tokens) == (batch.supervised, batch.tokens)
    assert counter.found == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_what_stays_on_the_cpu_is_enough(
    family: str,
    encoder_of: Callable[[str], Encoder],
    model_of: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another device ("meta" has shapes, but no values) a table that is left behind, or that should be, fails."""
    model = model_of(family)
    monkeypatch.setattr(sys.modules[type(model).__module__], "torch_compilable_check", lambda *_: None)  # reads values
    prepared = Preparation.of(model, Accelerator(cpu=True))(shared(encoder_of(family), tiny.records(6, per_image=3)))
    batch = prepared.to(torch.device("meta"))
    assert batch.on_host == {name for name, value in batch.inputs.items() if value.device.type == "cpu"}
    assert "image_position_ids" in batch.inputs.keys() - batch.on_host
    summed_loss(model.to("meta"), batch).backward()
    for name in batch.inputs.keys() - {"mm_token_type_ids", "image_window_index"}:  # unused; an index may lie anywhere
        wrong = copy.copy(batch)
        other = "meta" if name in batch.on_host else "cpu"
        wrong.inputs = {**batch.inputs, name: prepared.inputs[name].to(other)}
        with pytest.raises(RuntimeError, match="meta"):
            summed_loss(model, wrong)
