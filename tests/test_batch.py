"""Two layouts, one loss: padded rows and rows that share their image give equal losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import tiny
from vlmtune.batching import inputs
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import PADDING, Batch, branch_mask, branch_positions, padded, prefix_length, shared
from vlmtune.config.schema import GenerationConfig, TrainerConfig
from vlmtune.data.records import Record
from vlmtune.evaluation.generate import generate
from vlmtune.models.gradient_checkpointing import prepare
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.labels import IGNORE
from vlmtune.proof.probes import layouts_agree

FAMILIES = [*tiny.FAMILIES]
SIZES = ((56, 56), (112, 56), (28, 84))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(family: str, encoder_of: Callable[[str], Encoder]) -> Encoder:
    return encoder_of(family)


@pytest.fixture
def model(family: str, model_of: Callable[[str], Any]) -> Any:
    return model_of(family)


def loss_and_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to 1e-5, tensor by tensor; what is zero but for rounding is measured against the whole gradient."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 0.01 * whole), name


def assert_layouts_agree(model: Any, encoder: Encoder, rows: Sequence[Record]) -> None:
    plain, branched = padded(encoder, rows), shared(encoder, rows)
    assert plain.supervised == branched.supervised
    assert plain.rows == branched.rows == len(rows)
    wanted, gradients = loss_and_gradients(model, plain)
    found, others = loss_and_gradients(model, branched)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert_same(others, gradients)


def mixed_rows() -> list[Record]:
    """Groups of 1 to 4 rows about images of different sizes, between rows without image and without group."""
    rows: list[Record] = []
    for count in (1, 2, 3, 4):
        rows += tiny.records(10, per_image=count, sizes=SIZES)[:count]
        rows = [
            tiny.record(r.question, r.answers[0], r.images, f"{count}" if r in rows[-count:] else r.group) for r in rows
        ]
        rows.append(tiny.record(f"Say {count}", "one two three", images=[]))
    return rows


# ---------------------------------------------------------------- equal losses


def test_shared_equals_padded(model: Any, encoder: Encoder) -> None:
    assert_layouts_agree(model, encoder, mixed_rows())


@pytest.mark.parametrize(
    ("questions", "answers"),
    [
        (("Is it?", "Is it?", "Is it?"), ("yes", "yes", "no")),
        (("What?", "What?"), ("three small circles", "three small squares and more")),
        (("", "", "Is it?"), ("", "Red", "Red")),
        (("How many?",), ("three",)),
    ],
    ids=["same questions", "answers that start alike", "empty texts", "alone"],
)
def test_groups_that_differ_late_or_never(
    model: Any, encoder: Encoder, questions: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    """The prefix must end before the first supervised token, or a branch would lose the token that predicts it."""
    rows = [tiny.record(q, a, group="same") for q, a in zip(questions, answers, strict=True)]
    assert_layouts_agree(model, encoder, rows)


def test_several_images_turns_and_a_group_that_comes_back(model: Any, encoder: Encoder) -> None:
    pictures = [tiny.image(56, 56, 1), tiny.image(112, 56, 2)]
    rows = [
        tiny.record("Which?", "the left", pictures, "two"),
        tiny.record("And now?", "the right one", pictures, "two", earlier=[("Which?", "the left")]),
        tiny.record("Color?", "Red", [pictures[0]], "one"),
        tiny.record("Which is it?", "none", pictures, "two"),
    ]
    assert_layouts_agree(model, encoder, rows)


def test_each_image_is_computed_once(encoder: Encoder) -> None:
    rows = tiny.records(6, per_image=3)
    together, apart = shared(encoder, rows), padded(encoder, rows)
    assert 3 * together.inputs["pixel_values"].shape[0] == apart.inputs["pixel_values"].shape[0]
    assert together.input_ids.shape[0] == 2
    assert together.tokens < apart.tokens


def test_a_batch_of_text_alone_has_no_images(model: Any, encoder: Encoder) -> None:
    rows = [tiny.record("Say yes", "yes", images=[]), tiny.record("Say no", "no no", images=[])]
    assert "pixel_values" not in padded(encoder, rows).inputs
    assert_layouts_agree(model, encoder, rows)


# ---------------------------------------------------------------- the check that decides


def verdict(model: Any, encoder: Encoder) -> tuple[bool, str]:
    rows = tiny.records(6, per_image=3, sizes=SIZES)
    return layouts_agree(model, encoder, rows, Accelerator(cpu=True))


def test_the_check_says_yes_and_leaves_no_trace(model: Any, encoder: Encoder) -> None:
    model.train()
    fits, evidence = verdict(model, encoder)
    assert fits, evidence
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def sees_other_branches(branches: Tensor) -> Tensor:
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((branches[:, None, :] != PADDING) | torch.eye(length, dtype=torch.bool))[:, None] & causal


def one_position_late(prefix_positions: Tensor, branches: Tensor) -> Tensor:
    right = branch_positions(prefix_positions, branches)
    return torch.where(branches > 1, right + 1, right)


def counts_through(prefix_positions: Tensor, branches: Tensor) -> Tensor:
    return (torch.ones_like(branches).cumsum(1) - 1).expand_as(prefix_positions)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("branch_mask", sees_other_branches),
        ("branch_positions", one_position_late),
        ("branch_positions", counts_through),
    ],
)
def test_the_check_finds_a_planted_error(
    model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, name: str, planted: Any
) -> None:
    monkeypatch.setattr(inputs, name, planted)
    fits, evidence = verdict(model, encoder)
    assert not fits
    assert "differs" in evidence


def test_the_check_reports_a_model_that_refuses(model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise ValueError("attention mask of 4 dimensions\nis not supported")

    monkeypatch.setattr(inputs, "branch_mask", refuse)
    assert verdict(model, encoder) == (
        False,
        "this model does not support the shared layout (attention mask of 4 dimensions)",
    )


# ---------------------------------------------------------------- labels-only logits


@pytest.mark.parametrize("layout", [padded, shared])
def test_logits_for_labels_only_give_the_loss_of_all_logits(model: Any, encoder: Encoder, layout: Any) -> None:
    batch = layout(encoder, mixed_rows())
    model.zero_grad(set_to_none=True)
    logits = model(**model_inputs(model, batch)).logits[:, :-1]
    reference = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    reference.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found, others = loss_and_gradients(model, batch)
    assert found == pytest.approx(reference.item(), rel=1e-6)
    assert_same(others, gradients)


def test_the_loss_is_that_of_the_model_itself(model: Any, encoder: Encoder) -> None:
    """transformers' own mean loss over the same labels, times their count."""
    batch = padded(encoder, mixed_rows())
    own = model(**model_inputs(model, batch), labels=batch.labels).loss
    assert summed_loss(model, batch).item() == pytest.approx(own.item() * batch.supervised, rel=1e-5)


def test_a_batch_without_labels_reaches_every_weight_with_zero(model: Any, encoder: Encoder) -> None:
    """A rank without rows keeps the others company: without gradients of its own they would wait for ever."""
    batch = padded(encoder, tiny.records(2)).without_labels()
    loss, gradients = loss_and_gradients(model, batch)
    _, usual = loss_and_gradients(model, padded(encoder, tiny.records(2)))
    assert (loss, batch.rows, batch.supervised) == (0.0, 0, 0)
    assert gradients.keys() == usual.keys()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_labels_computes_one_logit(model: Any, encoder: Encoder, checkpointing: bool) -> None:
    """Of the vocabulary's size, not of every token's: such a rank needs less memory than the others."""
    if checkpointing:
        prepare(model.train(), TrainerConfig(gradient_checkpointing=True))
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:-1])))
    batch = shared(encoder, tiny.records(4, per_image=2)).without_labels()
    _, gradients = loss_and_gradients(model, batch)
    assert seen == [(1, 1)]
    assert {name for name, p in model.named_parameters() if p.requires_grad} - gradients.keys() == unused(
        model, encoder
    )


def unused(model: Any, encoder: Encoder) -> set[str]:
    """Weights that no batch reaches: layers of a tower above the one that features are taken from."""
    _, gradients = loss_and_gradients(model, padded(encoder, tiny.records(2)))
    return {name for name, _ in model.named_parameters()} - gradients.keys()


# ---------------------------------------------------------------- padding and inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(model: Any, encoder: Encoder, side: str) -> None:
    rows = [*tiny.records(3, sizes=SIZES), tiny.record("Say yes", images=[])]
    batch = padded(encoder, rows, answered=False, side=side)
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
        for number, row in enumerate(rows):
            alone = model(**model_inputs(model, padded(encoder, [row], answered=False))).logits[0, -1]
            last = int(batch.attention_mask[number].nonzero()[-1])
            torch.testing.assert_close(logits[number, last], alone, rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_their_neighbours(model: Any, encoder: Encoder) -> None:
    """And come back in order: each with its own length, stopped at its end token."""
    rows = [*tiny.records(4, sizes=SIZES), tiny.record("Say yes", images=[])]
    config = GenerationConfig(max_new_tokens=6)
    seen: list[int] = []
    options = {"autocast": nullcontext, "advance": seen.append}
    alone = generate(model, encoder, rows, config, batch_size=1, **options)
    assert generate(model, encoder, rows, config, batch_size=3, **options) == alone
    assert len(set(alone)) > 1, "else the order shows nothing"
    assert seen == [1, 1, 1, 1, 1, 3, 2]


@pytest.mark.parametrize("layout", [padded, shared])
def test_every_tensor_of_the_processor_reaches_the_model(
    model: Any, encoder: Encoder, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dropped one means wrong positions or masks, in some families without an error."""
    row = tiny.record()
    text = encoder.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    )
    returned = set(encoder.processor(text=[text], images=list(row.images), return_tensors="pt"))
    passed: dict[str, Any] = {}
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: passed.update(inputs) or forward(**inputs))
    summed_loss(model, layout(encoder, [row]))
    served = {"mm_token_type_ids"} if layout is shared else set()  # has become `position_ids` there
    assert returned - served <= set(passed)
    if layout is shared:
        assert "position_ids" in passed


def test_batches_travel_whole(encoder: Encoder) -> None:
    """A tensor forgotten in `to` or `without_labels` fails on the device only, or goes missing in silence."""
    batch = shared(encoder, tiny.records(4, per_image=2))
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.attention_mask, moved.labels, moved.branches, *moved.inputs.values()]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}
    assert (moved.rows, moved.inputs.keys()) == (batch.rows, batch.inputs.keys())
    assert batch.without_labels().branches is batch.branches


# ---------------------------------------------------------------- small pieces by hand


def test_prefix_length_by_hand() -> None:
    plain = [IGNORE] * 5
    assert prefix_length([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]], [plain, plain]) == 2
    assert prefix_length([[1, 2, 3, 4, 5]], [[IGNORE] * 3 + [4, 5]]) == 2
    assert prefix_length([[1, 2], [1, 2, 3]], [[IGNORE] * 2, [IGNORE] * 3]) == 1
    assert prefix_length([[1, 2], [3, 2]], [[IGNORE] * 2] * 2) == 0


def test_branch_mask_and_positions_by_hand() -> None:
    branches = torch.tensor([[0, 0, 1, 1, 2, PADDING]])
    mask = branch_mask(branches)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert branch_positions(torch.tensor([[0, 1, 7, 7, 7, 7]]), branches)[0, :5].tolist() == [0, 1, 2, 3, 2]
    axes = torch.tensor([[[0, 1, 9, 9, 9, 9]], [[0, 4, 9, 9, 9, 9]], [[0, 2, 9, 9, 9, 9]]])
    assert branch_positions(axes, branches)[:, 0, :5].tolist() == [[0, 1, 5, 6, 5], [0, 4, 5, 6, 5], [0, 2, 5, 6, 5]]
