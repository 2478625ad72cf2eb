"""The first passes through the model, before the first step: the loss is the model's own, gradients arrive where they
should, and the longest row fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import Batch, padded
from vlmtune.batching.loader import Loader
from vlmtune.data.records import Record
from vlmtune.errors import TrainingError
from vlmtune.models.parts import Parts, base_of
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder

REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)


def check_loss(model: Any, encoder: Encoder, records: Sequence[Record], engine: Any) -> str:
    """Raise TrainingError unless our loss of some rows is the one that the model computes from the same labels.

    In evaluation mode, on padded rows. The model makes logits of all places, so no more rows are taken than fit into
    `MOST_LOGITS` of them. A model that gives no loss of its own is named.
    """
    width = base_of(model).get_output_embeddings().weight.shape[0]
    longest = max(map(len, encoder.encode(records, answered=True).input_ids))
    rows = records[: MOST_LOGITS // (longest * width)]
    if not rows:
        return f"loss       not compared with the model's own: {longest} x {width} logits a row are too many to hold"
    batch = padded(encoder, rows).to(engine.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), engine.autocast():
            own = model(**model_inputs(model, batch), labels=batch.labels).loss
            ours = summed_loss(model, batch) / batch.supervised
    except torch.OutOfMemoryError:  # training holds the logits of answers alone, so it may fit
        return f"loss       not compared with the model's own: no memory for the logits of all {batch.places} places"
    except REFUSALS as error:
        return f"loss       not compared: this model computes none by itself ({str(error).splitlines()[0]:.80})"
    finally:
        model.train(was_training)
    gap = float((ours - own).abs() / own.abs().clamp(min=1e-6))
    allowed = 2e-2 if _computes_in_halves(model, engine) else 1e-3
    if not gap <= allowed and torch.isfinite(own):
        raise TrainingError(
            f"the loss of the first rows is {float(ours):.6f}, and the model's own from the same labels "
            f"{float(own):.6f} (relative difference {gap:.1e}, allowed {allowed:.0e}); please report this model"
        )
    return f"loss       {float(ours):.4f} a token, the model's own to {gap:.0e} ({len(rows)} rows)"


MOST_LOGITS = 2**28
"""Logits of the model's own loss that are held at once: 1 GB in float32."""


def _computes_in_halves(model: Any, engine: Any) -> bool:
    halves = (torch.float16, torch.bfloat16)
    return engine.mixed_precision != "no" or any(p.dtype in halves for p in model.parameters())


def check_gradients(model: Any, parts: Parts, encoder: Encoder, records: Sequence[Record], engine: Any) -> str:
    """Raise TrainingError where a frozen tensor gets a gradient, or a trainable one that these rows reach gets none.

    Reached is a tensor whose module (or the one that holds it) computes something in this pass. What isn't reached is
    named: a tower behind rows without images, its layers above the one that features are taken from.

    Zero is a gradient too: LoRA's A has none but zeros while B is zero.
    """
    loss, missed, leaking, used = _one_pass(model, padded(encoder, records).to(engine.device), engine)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if leaking:
        raise TrainingError(f"{len(leaking)} frozen weights get a gradient, among them {leaking[0]}")
    if len(missed) == len(trained):
        raise TrainingError("no trainable weight gets a gradient from these rows")
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss of the first rows is {float(loss)}; try trainer.precision=fp32")
    shown = any(record.images for record in records)
    owners = {name: _owners(model, name) for name in trained}
    if wrong := _unexplained(missed, owners, used, parts, shown):
        raise TrainingError(
            f"{len(wrong)} trainable weights that these rows reach get no gradient, among them {wrong[0]}: something "
            "detaches them, so they would never train"
        )
    reason = "not used by them" if shown else "they show no image"
    note = f"; {len(missed)} get none from these rows ({reason}), among them {missed[0]}" if missed else ""
    return f"gradients  reach {len(trained) - len(missed)} of {len(trained)} trainable tensors and no frozen one{note}"


def _unexplained(
    missed: Sequence[str], owners: dict[str, set[str]], used: set[str], parts: Parts, shown: bool
) -> list[str]:
    """Tensors that should have got a gradient: of the language model where they are used, and of a part behind images
    where it gets none at all although images are shown. `owners`: of each tensor that trains.
    """
    text = ("language", "head")
    wrong = [name for name in missed if parts.of(name) in text and used & owners[name]]
    for part in {parts.of(name) for name in missed} - set(text):
        own = [name for name in owners if parts.of(name) == part]
        wrong += own if shown and set(own) <= set(missed) and any(used & owners[name] for name in own) else []
    return wrong


def _owners(model: Any, name: str) -> set[str]:
    """The module of a tensor, and the module that holds that one: adapters' dictionaries are never called themselves,
    and what is in them may be computed with in one step.
    """
    module = name.rpartition(".")[0]
    holder = module.rpartition(".")[0]
    while holder and isinstance(model.get_submodule(holder), nn.ModuleDict | nn.ParameterDict):
        holder = holder.rpartition(".")[0]
    return {module, holder}


def _one_pass(model: Any, batch: Batch, engine: Any) -> tuple[Tensor, list[str], list[str], set[str]]:
    """The loss, trainable tensors without a gradient, frozen ones with one, and modules that were used."""
    was_training = model.training
    model.train()
    try:
        with _noting_use(model) as used, engine.autocast():
            loss = summed_loss(model, batch)
        loss.backward()
        missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        leaking = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # layers that PEFT or the quantizer wrapped, but can't compute with
        raise TrainingError(
            f"the first forward and backward pass fails with {type(error).__name__}: {error}. This model, adapter and "
            "quantization don't go together here"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return loss.detach(), missed, leaking, used


@contextmanager
def _noting_use(model: Any) -> Iterator[set[str]]:
    """The names of the modules that compute while inside."""
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


def check_longest(model: Any, loader: Loader, candidates: Sequence[Record], engine: Any) -> str:
    """Take the longest training row through one forward and backward pass, in a batch as the run will make them.

    `candidates`: rows that may be the longest. Raises TrainingError where the pass fails, and lets running out of
    memory through, which says what needs less.
    """
    if not candidates:
        return "longest    unknown: a stream's rows are not known in advance"
    lengths = [image + text for image, text in loader.encoder.lengths(candidates)]
    longest = candidates[lengths.index(max(lengths))]
    batch = loader.around(longest, max(lengths)).to(engine.device)
    loss, *_ = _one_pass(model, batch, engine)
    if not torch.isfinite(loss):
        raise TrainingError(f"{longest.place}: the loss of this longest row is {float(loss)}")
    company = f" in a batch of {batch.rows}" if batch.rows > 1 else ""
    return f"longest    {max(lengths)} tokens ({longest.place}) pass forward and backward{company}"
