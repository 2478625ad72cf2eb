"""Before the first step: the loss is the model's own, gradients arrive where they should, the longest row fits, and
rows share only what is the same for all of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import tiny
import tiny_families
from vlmtune.batching.groups import groups_of
from vlmtune.batching.layout import Layout, shared
from vlmtune.batching.loader import Loader
from vlmtune.batching.order import plan
from vlmtune.config.schema import GenerationConfig
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import RecordList
from vlmtune.errors import TrainingError
from vlmtune.evaluation.generate import generate
from vlmtune.memory import memory_advice
from vlmtune.models import adapters
from vlmtune.models.parts import find_parts
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import first_pass
from vlmtune.proof.first_pass import check_gradients, check_longest, check_loss
from vlmtune.proof.pairs import pairs
from vlmtune.proof.probes import answers_agree, choose_layout, layouts_agree

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_compared_with_the_models_own(
    family: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    said = check_loss(model_of(family), encoder_of(family), tiny.records(3), Accelerator(cpu=True))
    assert ("does not compute a loss" if family == "idefics" else "differs from the model's own by") in said


def test_another_loss_is_found(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = first_pass.summed_loss
    monkeypatch.setattr(first_pass, "summed_loss", lambda model, batch: real(model, batch) * 1.01)
    with pytest.raises(TrainingError, match=r"relative difference 1\.0e-02, allowed 1e-03"):
        check_loss(model_of("llava"), encoder_of("llava"), tiny.records(3), Accelerator(cpu=True))


def test_a_model_without_a_loss_and_one_too_wide_are_said(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = model_of("qwen2_vl"), encoder_of("qwen2_vl")
    model.loss_function = lambda *args, **options: (_ for _ in ()).throw(NotImplementedError("no loss here"))
    assert "this model does not compute a loss (no loss here)" in check_loss(
        model, encoder, tiny.records(2), Accelerator(cpu=True)
    )
    monkeypatch.setattr(first_pass, "MOST_LOGITS", 100)
    assert "need too much memory" in check_loss(model, encoder, tiny.records(2), Accelerator(cpu=True))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [True, False])
def test_full_training_passes_in_every_family(
    family: str, images: bool, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    """Towers behind rows without images, layers above the one that features are taken from: named, no error."""
    model, encoder = model_of(family), encoder_of(family)
    if not images and encoder.family.needs_image:
        return
    rows = tiny.records(2) if images else [tiny.record("Say yes", "yes", [])]
    said = check_gradients(model.requires_grad_(True), find_parts(model), encoder, rows, Accelerator(cpu=True))
    assert ("get none (these rows have no images)" in said) or images


@pytest.mark.parametrize("layer", ["language_model.layers.0.mlp", "visual.merger"])
def test_what_these_rows_reach_must_get_a_gradient(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], layer: str
) -> None:
    """A module that computes under no_grad would never train, and the loss would fall all the same."""
    model, encoder = model_of("qwen2_vl"), encoder_of("qwen2_vl")
    module = model.model.get_submodule(layer)
    module.forward = torch.no_grad()(module.forward)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("model.visual") or layer in name)
    with pytest.raises(TrainingError, match=rf"get no gradient, for instance model\.{layer}".replace(".", r"\.", 0)):
        check_gradients(model, find_parts(model), encoder, tiny.records(2), Accelerator(cpu=True))


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha", "ia3", "vera"])
def test_an_adapter_that_these_rows_reach_must_get_a_gradient(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], adapter: str
) -> None:
    """LoRA computes in one step here, which calls none of the modules that its tensors are in."""
    fields: dict[str, Any] = {"method": adapter, "parts": ["language"], "target_modules": ["k_proj", "down_proj"]}
    fields |= {"dora": {"method": "lora", "use_dora": True}, "ia3": {"feedforward_modules": ["down_proj"]}}.get(
        adapter, {}
    )
    model, encoder = model_of("qwen2_vl"), encoder_of("qwen2_vl")
    parts = find_parts(model)
    model = adapters.adapt(model, tiny.config(None, adapter=fields), parts)
    check_gradients(model, parts, encoder, tiny.records(2), Accelerator(cpu=True))
    layer = model.get_base_model().model.language_model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x.detach()).detach()
    with pytest.raises(TrainingError, match=r"are used but get no gradient, for instance .*layers\.1\.mlp"):
        check_gradients(model, parts, encoder, tiny.records(2), Accelerator(cpu=True))


# ---------------------------------------------------------------- the longest row


def loader_of(encoder: Encoder, records: list[Record], *, share: bool = False, **trainer: Any) -> Loader:
    chosen = tiny.config(None, **trainer).trainer
    rows = RecordList(records)
    lengths = encoder.lengths(rows) if chosen.batch_tokens else []
    steps = plan(chosen, groups_of(rows, encoder), lengths, processes=1, streamed=False, by_group=share)
    return Loader(encoder, rows, steps, Layout(share), chosen, Accelerator(cpu=True))


def test_the_longest_row_goes_first(encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]) -> None:
    encoder, seen = encoder_of("qwen2_vl"), []
    model = model_of("qwen2_vl")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    long = dataclasses.replace(tiny.record("word " * 50), row=6)
    loader = loader_of(encoder, [*tiny.records(5), long], batch_size=3)
    said = check_longest(model, loader, [0, 5], Accelerator(cpu=True))
    length = len(encoder.encode([long], answered=True).input_ids[0])
    assert seen == [(3, length)]
    assert f"{length} tokens (data, row 7) fit into memory, forward and backward in a batch of 3" in said
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("trainer", [{"batch_size": 4}, {"batch_tokens": 200}, {"batch_size": 2, "epochs": 2.0}])
def test_the_longest_batch_is_one_that_the_run_makes(
    encoder_of: Callable[[str], Encoder], share: bool, trainer: dict[str, Any]
) -> None:
    """A larger one could run out of memory where training would not, a smaller one would hide that training does."""
    encoder = encoder_of("qwen2_vl")
    rows = [dataclasses.replace(about(f"Is it {n}?" + " word" * n), group=f"image {n // 3}") for n in range(12)]
    loader = loader_of(encoder, rows, share=share, max_steps=None, **trainer)
    made = [loader.make(*place).input_ids for place in loader._micro_batch_numbers(0)]
    for row in range(12):
        found = loader.around(row)
        assert any(torch.equal(found.input_ids, ids) for ids in made)
    assert loader.around(11).padded_tokens == max(ids.numel() for ids in made) or share or "batch_tokens" in trainer


def test_a_comparison_that_needs_more_memory_than_training_is_left_out(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    model = model_of("qwen2_vl")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model.lm_head.register_forward_pre_hook(full)
    said = check_loss(model, encoder_of("qwen2_vl"), tiny.records(2), Accelerator(cpu=True))
    assert "not compared with the model's own: out of memory" in said


def test_no_memory_for_the_longest_row_is_said_before_the_first_step(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    model = model_of("qwen2_vl")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(full)
    with pytest.raises(TrainingError, match=r"out of device memory.*trainer\.batch_size"), memory_advice():
        check_longest(model, loader_of(encoder_of("qwen2_vl"), tiny.records(2)), [0], Accelerator(cpu=True))


# ---------------------------------------------------------------- what rows share


PICTURE = tiny.image(112, 56, 3)


def about(text: str, answer: str = "Red", at: tuple[int, ...] = (), **more: Any) -> Record:
    return Record((Turn(text, (answer,), at),), (PICTURE,), "one image", **more)


MIXED = [
    about("What is it?\n", "a", (12,)),
    about("What is it?\n", "b", (12,)),
    about("How many?\n", "b", (10,)),
    about("<image> What?", "c"),
    about("What?", "d"),
    about("What?", "e", system="Be brief."),
    about("Which?", "f", system="Be brief."),
    about("Which?", "g", system="Be kind."),
    about("Which color is it?", "h"),
]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "smolvlm", "internvl", "gemma3"])
def test_a_group_is_the_same_prompt_up_to_the_last_image(encoder_of: Callable[[str], Encoder], family: str) -> None:
    encoder = encoder_of(family)
    keys = [encoder.prompt.group(record) for record in MIXED]
    prompts = [encoder.render(record, answered=False)[0] for record in MIXED]
    token = encoder.family.image_token
    fronts = [prompt.rpartition(token)[0] for prompt in prompts]
    for one in range(len(MIXED)):
        for other in range(len(MIXED)):
            if keys[one] == keys[other]:
                assert fronts[one] == fronts[other]
    assert keys[3] == keys[4] == keys[8]
    assert len(set(keys)) >= 3


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "smolvlm", "internvl"])
def test_rows_that_place_their_image_differently_are_laid_out_right(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], family: str
) -> None:
    model, encoder = model_of(family), encoder_of(family)
    assert layouts_agree(model, encoder, MIXED, Accelerator(cpu=True))[0]
    assert answers_agree(model, encoder, MIXED, Accelerator(cpu=True))
    ask = {"generation": GenerationConfig(max_new_tokens=4), "batch_size": 16, "autocast": torch.no_grad}
    assert generate(model, encoder, MIXED, share=True, **ask) == generate(model, encoder, MIXED, **ask)


def test_an_answer_that_is_trained_ends_what_rows_share(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    """With two images, the second in a later turn: its tokens stand behind a label."""
    images = (PICTURE, tiny.image(seed=9))
    rows = [
        Record((Turn("a?", ("b",), (0,)), Turn(f"{q}?", ("c",), (0,))), images, "two images") for q in ("one", "two")
    ]
    last = encoder_of("qwen2_vl")
    assert last.prompt.group(rows[0]) == last.prompt.group(rows[1]) is not None
    both = Encoder(last.processor, supervise="all")
    assert both.prompt.group(rows[0]) is None
    for encoder in (last, both):
        assert layouts_agree(model_of("qwen2_vl"), encoder, rows, Accelerator(cpu=True))[0]
    assert len(shared(both, rows).input_ids) == 2


def test_each_kind_of_row_is_probed(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen2_vl")
    usual = tiny.records(40, per_image=4)
    behind = [dataclasses.replace(MIXED[n % 2], group=f"b{n // 2}") for n in range(4)]
    system = [dataclasses.replace(MIXED[5 + n], group="c") for n in range(2)]
    rows = [*usual, *behind, *system]
    found = pairs(encoder, rows, groups_of(RecordList(rows), encoder), 6)
    assert {(encoder.prompt.shape(part[0]), part[0].system) for part in found} == {
        ((False, ("it",)), None),
        ((False, ("ti",)), None),
        ((True, ("it",)), "Be brief."),
    }
    assert all(2 <= len(part) <= 6 for part in found)
    lengths = {len(record.question) for record in found[-1]}
    assert len(lengths) > 1, "questions of unlike length"


def test_one_kind_that_differs_is_enough_for_padded_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    verdicts = iter([(True, "equal"), (False, "loss differs by 0.3")])
    monkeypatch.setattr("vlmtune.proof.probes.layouts_agree", lambda *_: next(verdicts))
    alike, trainer = [[tiny.record()], [tiny.record()]], tiny.config(None).trainer
    found = choose_layout(None, None, alike, trainer, Accelerator(cpu=True), evaluated=True)  # type: ignore[arg-type]
    assert "padded, one row each (loss differs by 0.3)" in found.sentence
    assert not found.share
    assert not found.share_answers
