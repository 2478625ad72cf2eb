"""Checks that run the model before the first step: the loss equals the model's own, gradients reach the right weights,
and the longest row fits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import PLAIN, Batch, Layout, lay_out, padded
from vlmtune.batching.loader import Loader
from vlmtune.data.records import Record
from vlmtune.errors import TrainingError
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.memory import is_out_of_memory
from vlmtune.models.chance import without_chance
from vlmtune.models.parts import Parts, base_of
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder

REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, MemoryError)
"""What a model raises if it does not support a form of its inputs, or has no memory for it."""


def check_loss(model: Any, encoder: Encoder, records: Sequence[Record], engine: Engine) -> str:
    """Raise TrainingError unless our loss of some rows equals the loss that the model computes from the same labels.

    As in training without chance, on padded rows. The model computes logits at all positions, so the number of rows is
    limited to `MOST_LOGITS` logits. The log says so if a model computes no loss.
    """
    width = base_of(model).get_output_embeddings().weight.shape[0]
    longest = max(map(len, encoder.encode(records, answered=True).input_ids))
    rows = records[: MOST_LOGITS // (longest * width)]
    if not rows:
        return f"loss       not compared with the model's own: {longest} x {width} logits per row need too much memory"
    batch = padded(encoder, rows).to(engine.device)
    try:
        with without_chance(model), torch.no_grad(), engine.autocast():
            own = model(**model_inputs(model, batch), labels=batch.labels).loss
            ours = summed_loss(model, batch) / batch.supervised
    except REFUSALS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        short = is_out_of_memory(error)
    else:
        return _loss_verdict(float(ours), float(own), len(rows), halves=computes_in_halves(model, engine))
    if not short:
        return f"loss       not compared: this model does not compute a loss ({reason:.80})"
    session.free_memory()  # training only holds the logits of answers, so it may still fit
    return f"loss       not compared with the model's own: out of memory for {batch.padded_tokens} x {width} logits"


def _loss_verdict(ours: float, own: float, rows: int, *, halves: bool) -> str:
    """The line for the log. Raises TrainingError if the losses differ by more than rounding."""
    gap = abs(ours - own) / max(abs(own), 1e-6)
    allowed = 2e-2 if halves else 1e-3
    if not gap <= allowed and math.isfinite(own):
        raise TrainingError(
            f"the loss of the first rows is {ours:.6f}, but the model computes {own:.6f} from the same "
            f"labels (relative difference {gap:.1e}, allowed {allowed:.0e}); please report this model"
        )
    return f"loss       {ours:.4f} per token, differs from the model's own by {gap:.0e} ({rows} rows)"


MOST_LOGITS = 2**28
"""The most logits to hold for the model's own loss: 1 GB in float32."""


def computes_in_halves(model: Any, engine: Engine) -> bool:
    halves = (torch.float16, torch.bfloat16)
    return engine.mixed_precision != "no" or any(p.dtype in halves for p in model.parameters())


def check_gradients(
    model: Any,
    parts: Parts,
    encoder: Encoder,
    records: Sequence[Record],
    engine: Engine,
    layout: Layout = PLAIN,
    *,
    keeps_gradients: bool = True,
) -> str:
    """Raise TrainingError if a frozen tensor gets a gradient, or a trainable one that these rows reach gets none.

    A tensor is reached if its module (or the module's holder) runs in this pass. The log names tensors that are not
    reached: a vision tower if the rows have no images, or its layers above the one that features are taken from.

    Zero counts as a gradient: LoRA's A only gets zeros while B is zero.
    """
    batch = lay_out(encoder, records, layout).to(engine.device)
    loss, missed, leaking, used = _one_pass(model, batch, engine, keeps_gradients)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if leaking:
        raise TrainingError(f"{len(leaking)} frozen weights get a gradient, for instance {leaking[0]}")
    if len(missed) == len(trained):
        raise TrainingError("no trainable weight gets a gradient from these rows")
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss of the first rows is {float(loss)}; try trainer.precision=fp32")
    shown = any(record.images for record in records)
    owners = {name: _owners(model, name) for name in trained}
    if wrong := _unexplained(missed, owners, used, parts, shown):
        raise TrainingError(
            f"{len(wrong)} trainable weights are used but get no gradient, for instance {wrong[0]}: their layer "
            "detaches them, so they would never train"
        )
    reason = "these rows don't use them" if shown else "these rows have no images"
    note = f"; {len(missed)} get none ({reason}), for instance {missed[0]}" if missed else ""
    return f"gradients  reach {len(trained) - len(missed)} of {len(trained)} trainable tensors, no frozen ones{note}"


def _unexplained(
    missed: Sequence[str], owners: dict[str, set[str]], used: set[str], parts: Parts, shown: bool
) -> list[str]:
    """Tensors that should have a gradient: those of the language model that are used, and all of an image part if the
    part gets no gradient at all although there are images. `owners`: the modules of each trainable tensor.
    """
    text = ("language", "head")
    wrong = [name for name in missed if parts.of(name) in text and used & owners[name]]
    for part in {parts.of(name) for name in missed} - set(text):
        own = [name for name in owners if parts.of(name) == part]
        wrong += own if shown and set(own) <= set(missed) and any(used & owners[name] for name in own) else []
    return wrong


def _owners(model: Any, name: str) -> set[str]:
    """The module of a tensor, and the module that holds that one: the dictionaries of adapters are never called
    themselves, and the layers in them may be computed by their holder.
    """
    module = name.rpartition(".")[0]
    holder = module.rpartition(".")[0]
    while holder and isinstance(model.get_submodule(holder), nn.ModuleDict | nn.ParameterDict):
        holder = holder.rpartition(".")[0]
    return {module, holder}


def _one_pass(
    model: Any, batch: Batch, engine: Engine, keeps_gradients: bool
) -> tuple[Tensor, list[str], list[str], set[str]]:
    """The loss, trainable tensors without a gradient, frozen tensors with one, and the modules that ran.

    Exactly as in training: some adapters have weights that only their sampling uses, and gradients are freed as they
    arise where training frees them too (optimizer.step_in_backward).
    """
    was_training = model.training
    model.train()
    reached: set[str] = set()

    def note(parameter: Tensor, name: str) -> None:
        reached.add(name)
        parameter.grad = parameter.grad if keeps_gradients else None

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(partial(note, name=name)) for name, p in trained]
    try:
        with _noting_use(model) as used, engine.autocast():
            loss = summed_loss(model, batch)
        loss.backward()
        missed = [name for name, _ in trained if name not in reached]
        leaking = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    except Exception as error:  # layers that PEFT or the quantizer wrapped but can't run
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"the first forward and backward pass failed with {type(error).__name__}: {error}. This combination of "
            "model, adapter and quantization does not work here"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return loss.detach(), missed, leaking, used


@contextmanager
def _noting_use(model: Any) -> Iterator[set[str]]:
    """The names of the modules that run inside the context."""
    used: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: used.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def check_longest(
    model: Any, loader: Loader, candidates: Sequence[int], engine: Engine, *, keeps_gradients: bool = True
) -> str:
    """Run one forward and backward pass with the longest training row, in the micro-batch that will have it.

    `candidates`: numbers of rows that may be the longest. Raises TrainingError if the pass fails. An out-of-memory
    error passes through; its handler says which settings need less memory.
    """
    if not candidates:
        return "longest    unknown: the rows of a stream are not known in advance"
    lengths = [image + text for image, text in loader.encoder.lengths([loader.records[row] for row in candidates])]
    row = candidates[lengths.index(max(lengths))]
    longest, batch = loader.records[row], loader.around(row).to(engine.device)
    loss, *_ = _one_pass(model, batch, engine, keeps_gradients)
    if not torch.isfinite(loss):
        raise TrainingError(f"{longest.place}: the loss of this longest row is {float(loss)}")
    company = f" in a batch of {batch.rows}" if batch.rows > 1 else ""
    return f"longest    {max(lengths)} tokens ({longest.place}) fit into memory, forward and backward{company}"
