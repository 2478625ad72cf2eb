"""Each model family: parts, adapters, padding, images, answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import tiny
import tiny_families
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import Batch, padded
from vlmtune.config.schema import PARTS, GenerationConfig
from vlmtune.data.records import Record
from vlmtune.errors import ModelError
from vlmtune.evaluation.generate import generate
from vlmtune.models.parts import find_parts
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.proof.checks import check_inputs
from vlmtune.proof.probes import layouts_agree

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
LANGUAGE = ("model.language_model.layers.", "model.text_model.layers.", "model.layers.")
BIDIRECTIONAL = {"paligemma2"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(family: str, encoder_of: Callable[[str], Encoder]) -> Encoder:
    return encoder_of(family)


@pytest.fixture
def model(family: str, model_of: Callable[[str], Any]) -> Any:
    return model_of(family)


def rows(encoder: Encoder) -> list[Record]:
    """Images of three shapes, two images in one row, and no image where the family takes such rows."""
    found = [
        tiny.record("What color?", "Red", [tiny.image(100, 60, 1)]),
        tiny.record("How many circles are there in the picture?", "three small circles", [tiny.image(56, 56, 2)]),
        tiny.record("Which?", "the left", [tiny.image(40, 112, 3), tiny.image(56, 56, 4)]),
    ]
    return found + ([] if encoder.family.needs_image else [tiny.record("Say yes", "yes", [])])


def logits_of_answers(model: Any, batch: Batch) -> list[torch.Tensor]:
    """[answer tokens, V] of each row: what predicts its supervised tokens."""
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
    return [logits[row, :-1][batch.labels[row, 1:] != -100] for row in range(len(batch.labels))]


# ---------------------------------------------------------------- parts


def test_every_weight_is_in_one_part_and_each_part_has_weights(model: Any, family: str) -> None:
    parts = find_parts(model)
    counts = Counter(parts.of(name) for name, _ in model.named_parameters())
    assert set(counts) <= set(PARTS)
    expected = {"vision", "projector", "language"} | ({"cross_attention"} if family == "idefics" else set())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert set(counts) == expected | (set() if tied else {"head"})
    encoder = {id(p) for p in model.get_encoder(modality="image").parameters()}
    vision = {id(p) for name, p in model.named_parameters() if parts.of(name) == "vision"}
    assert vision <= encoder, "vision holds the image encoder's weights alone"
    inside = {name for name, p in model.named_parameters() if id(p) in encoder - vision}
    assert all("merger" in name for name in inside), "the rest of it is the projector that some families keep inside"


def test_a_bare_list_means_the_language_model(model: Any) -> None:
    """By themselves these names also hit vision towers, and Idefics' perceiver and cross-attention."""
    found = tiny.targets(model, find_parts(model), ["q_proj", "v_proj"], ["language"])
    layers = sum(name.endswith("self_attn.q_proj") and name.startswith(LANGUAGE) for name, _ in model.named_modules())
    assert len(found) == 2 * layers
    assert all(name.startswith(LANGUAGE) and name.endswith(("self_attn.q_proj", "self_attn.v_proj")) for name in found)


def test_every_part_can_carry_an_adapter(model: Any, family: str) -> None:
    parts = find_parts(model)
    for part in ("vision", "projector", "language"):
        if (family, part) == ("gemma3", "projector"):
            continue  # a bare parameter, no layer
        found = tiny.targets(model, parts, "all-linear", [part])
        assert found
        assert {parts.of(name) for name in found} == {part}


# ---------------------------------------------------------------- one row, however it is batched


def test_right_padding_is_left_padding_is_alone(model: Any, encoder: Encoder) -> None:
    records = rows(encoder)
    right = logits_of_answers(model, padded(encoder, records))
    left = logits_of_answers(model, padded(encoder, records, side="left"))
    alone = [logits_of_answers(model, padded(encoder, [record]))[0] for record in records]
    for wanted, other, single in zip(right, left, alone, strict=True):
        torch.testing.assert_close(other, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single, wanted, rtol=1e-4, atol=1e-4)


def test_the_image_reaches_the_answer(model: Any, encoder: Encoder) -> None:
    one, other = (padded(encoder, [tiny.record(images=[tiny.image(seed=n)])]) for n in (1, 2))
    [first], [second] = logits_of_answers(model, one), logits_of_answers(model, other)
    assert (first - second).abs().max() > 1e-3


def test_each_image_token_gets_a_feature(model: Any, encoder: Encoder, family: str) -> None:
    """Counted at the projector's output; Idefics attends to its features instead of taking them into the sequence."""
    if family == "idefics":
        return
    batch = padded(encoder, rows(encoder))
    with torch.no_grad():
        found = model.model.get_image_features(
            **{k: v for k, v in batch.inputs.items() if k not in ("mm_token_type_ids", "token_type_ids")}
        )
    features = found.pooler_output if hasattr(found, "pooler_output") else found
    features = [features] if torch.is_tensor(features) else list(features)
    count = sum(feature.shape[:-1].numel() for feature in features)
    assert int((batch.input_ids == model.config.image_token_id).sum()) == count


SHARED = {
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "idefics3",
    "smolvlm",
    "internvl",
}
"""Families whose attention is causal over a mask of one's own. The start-up check has to find that out by itself."""


def test_the_start_up_check_finds_who_can_share_prefixes(model: Any, encoder: Encoder, family: str) -> None:
    records = tiny.records(6, per_image=3, sizes=((56, 56), (100, 60)))
    fits, evidence = layouts_agree(model, encoder, records, Accelerator(cpu=True))
    assert fits == (family in SHARED), evidence


def test_the_start_up_check_holds_inputs_against_the_processor(encoder: Encoder, family: str) -> None:
    awkward = tiny.record("<image> or <|im_end|>?", "a <image></s>", [tiny.image(100, 60), tiny.image()])
    assert "inputs" in check_inputs(encoder, rows(encoder))
    if family != "paligemma2":
        assert "inputs" in check_inputs(encoder, [awkward])


def test_a_family_that_needs_more_is_refused_before_training(
    encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Mllama's, whose processor makes a mask of which token looks at which tile."""
    encoder = encoder_of("llava")
    cls = type(encoder.processor)
    call = cls.__call__

    def with_mask(self: Any, *args: Any, **options: Any) -> Any:
        made = call(self, *args, **options)
        return made if options.get("return_text_replacement_offsets") else {**made, "cross_attention_mask": 1}

    monkeypatch.setattr(cls, "__call__", with_mask)
    with pytest.raises(ModelError, match="also returns cross_attention_mask for a prompt"):
        check_inputs(encoder, rows(encoder))


def test_text_alone_trains(model: Any, encoder: Encoder) -> None:
    if encoder.family.needs_image:
        return
    loss = summed_loss(model, padded(encoder, [tiny.record("Say yes", "yes", []), tiny.record("Say no", "no no", [])]))
    loss.backward()
    assert torch.isfinite(loss)
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- answers


def test_batched_answers_are_those_of_single_rows(
    model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(ids: list[list[int]]) -> list[str]:
        pad = re.escape(encoder.tokenizer.pad_token)
        return [re.sub(f"({pad})*$", "", encoder.tokenizer.decode(row)) for row in ids]

    monkeypatch.setattr(encoder.answers, "decode", everything)
    records = rows(encoder)
    ask = {"generation": GenerationConfig(max_new_tokens=6), "autocast": torch.no_grad}
    together = generate(model, encoder, records, batch_size=4, **ask)
    assert together == generate(model, encoder, records, batch_size=1, **ask)
    assert any(together)


def test_no_answer_holds_an_image_token(model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained head that likes nothing more: the next step would look for a feature that isn't there."""
    seen: list[list[int]] = []
    monkeypatch.setattr(encoder.answers, "decode", lambda ids: seen.extend(ids) or [""] * len(ids))
    head, wanted = model.get_output_embeddings(), encoder.answers.image_ids
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor(wanted), 1e4))
    generate(model, encoder, rows(encoder), GenerationConfig(max_new_tokens=4), batch_size=4, autocast=torch.no_grad)
    assert seen
    assert not {i for row in seen for i in row} & set(wanted)
