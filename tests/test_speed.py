"""Each fast path equals the plain one: features in place of pixels, shared answers, drafts, rewrites."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

import tiny
import tiny_families
from grids import sampled, thinned
from test_families import SHARED
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import PLAIN, padded, shared
from vlmtune.config import compose
from vlmtune.config.schema import DataConfig, GenerationConfig, ModelConfig
from vlmtune.data import table
from vlmtune.data.images import content_key
from vlmtune.data.records import Record
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.drafts import Draft
from vlmtune.evaluation.generate import generate
from vlmtune.models import adapters, lora, rewrites
from vlmtune.models import features as kept
from vlmtune.models.adapters import adapt
from vlmtune.models.features import FeatureStore
from vlmtune.models.load import load
from vlmtune.models.parts import find_parts
from vlmtune.models.rewrites import ATTENTION, PatchMatmul, QuickGELU, keep_freed_memory, length_multiple
from vlmtune.objectives import next_token as losses
from vlmtune.objectives.next_token import summed_loss, supervised_logits
from vlmtune.prompt import image_cache
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import PixelStore, pixels_mark
from vlmtune.prompt.labels import IGNORE
from vlmtune.proof.probes import ImageCache, answers_agree, choose_cache

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
QUICK = ("qwen2_vl", "qwen3_vl", "llava_next", "idefics", "smolvlm", "gemma3", "qwen3_5")
"""Grids, features of several layers, tiles, cross-attention, other tiles, windows of attention, layers without any."""
REFUSED = {"idefics": "doesn't accept features in place of pixels"}
SIZES = ((56, 56), (100, 60), (40, 112))


@pytest.fixture(autouse=True)
def empty() -> None:
    image_cache.STORES.clear()


@pytest.fixture
def adapted(checkpoint_of: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A family's model with LoRA, B drawn too: it starts as zero, and A would get no gradient."""

    def model(family: str, quantization: str) -> Any:
        config = tiny.config(checkpoint_of(family), adapter=tiny.LORA)
        types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
        opened, _ = load(config.model, tiny.method(tiny.QUANTIZED.get(quantization, {})), **types)
        made = adapt(opened, config, find_parts(opened)).eval()
        for parameter in made.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
        return made

    return model


def frozen(model: Any) -> Any:
    parts = find_parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts.of(name) not in kept.FROZEN)
    return model


def features_of(model: Any, encoder: Encoder, **data: Any) -> FeatureStore:
    return FeatureStore(model, find_parts(model), encoder.processor, DataConfig(**data), Accelerator(cpu=True))


def loss_and_gradient(model: Any, batch: Any) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def rows(encoder: Encoder) -> list[Record]:
    found = tiny.records(6, per_image=2, sizes=SIZES)
    found.append(tiny.record("Which?", "the left", [tiny.image(40, 112, 8), tiny.image(56, 56, 9)], group="two"))
    return found + ([] if encoder.family.needs_image else [tiny.record("Say yes", "yes", [])])


# ---------------------------------------------------------------- features in place of pixels


@pytest.mark.parametrize("family", sampled(FAMILIES, QUICK))
def test_features_equal_pixels(family: str, encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model = encoder_of(family), frozen(model_of(family))
    if family in REFUSED:
        assert REFUSED[family] in str(kept.refusal(model, find_parts(model)))
        return
    assert kept.refusal(model, find_parts(model)) is None
    layouts = [padded, *([shared] if family in SHARED else [])]
    wanted = [loss_and_gradient(model, make(encoder, rows(encoder))) for make in layouts]
    encoder = encoder.keeping(features_of(model, encoder))
    for _ in range(2):  # computed, then found
        for make, (loss, gradient) in zip(layouts, wanted, strict=True):
            batch = make(encoder, rows(encoder))
            assert not [key for key in batch.inputs if key.startswith("pixel")]
            found, other = loss_and_gradient(model, batch)
            assert found == pytest.approx(loss, rel=1e-5)
            assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    assert encoder.image_cache.computed == 4  # three images and a pair


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_features_equal_pixels_under_lora(
    family: str, quantization: str, encoder_of: Any, adapted: Callable[..., Any]
) -> None:
    encoder, model = encoder_of(family), adapted(family, quantization)
    loss, gradient = loss_and_gradient(model, padded(encoder, rows(encoder)))
    encoder = encoder.keeping(features_of(model, encoder))
    found, other = loss_and_gradient(model, padded(encoder, rows(encoder)))
    assert found == pytest.approx(loss, rel=1e-5)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()


def processed(encoder: Encoder) -> list[Any]:
    """Of nine images in three shapes, and of two pairs."""
    single = [encoder.family.images([[tiny.image(*SIZES[n % 3], n)]]) for n in range(9)]
    pair = [encoder.family.images([[tiny.image(56, 56, n), tiny.image(40, 112, n)]]) for n in (1, 2)]
    return single + pair


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_images_are_encoded_together_where_that_is_bit_equal(
    family: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of(family), frozen(model_of(family))
    images = processed(encoder)
    features = features_of(model, encoder)
    alone = [entry for image in images for entry in features.compute([image])]
    assert features.exact == {}
    calls: list[int] = []
    encoded = features._encoded
    monkeypatch.setattr(features, "_encoded", lambda some: calls.append(len(some)) or encoded(some))
    for _ in range(2):  # tried, then done as found best
        calls.clear()
        for found, wanted in zip(features.compute(images), alone, strict=True):
            assert kept._equal(found, wanted)
            assert found.expansions == wanted.expansions
            assert found.inputs.keys() == wanted.inputs.keys()
            assert all(torch.equal(found.inputs[key], wanted.inputs[key]) for key in wanted.inputs)
    assert sum(calls) == len(images)
    assert max(calls) == (max((count for (_, count), same in features.exact.items() if same), default=1))
    assert max(calls) <= kept.TOGETHER


@pytest.mark.parametrize("refuses", [False, True])
def test_an_encoder_that_mixes_or_refuses_several_images_sees_each_alone(
    refuses: bool, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of("llava"), frozen(model_of("llava"))
    features, images = features_of(model, encoder), processed(encoder)
    encode = model.base_model.get_image_features

    def mixing(pixel_values: Tensor, **options: Any) -> Any:
        if refuses and len(pixel_values) > 2:
            raise RuntimeError("takes no more than a pair")
        return encode(pixel_values=pixel_values + 0.1 * pixel_values.mean(), **options)

    monkeypatch.setattr(model.base_model, "get_image_features", mixing)
    alone = [entry for image in images for entry in features.compute([image])]
    for _ in range(2):
        assert all(map(kept._equal, features.compute(images), alone))
    assert set(features.exact.values()) == {False}


def chosen(
    model: Any, encoder: Encoder, wish: str, *, seen_once: bool = False, folder: Path | None = None
) -> ImageCache:
    config = tiny.config(None)
    config.data = DataConfig(cache_features=wish, cache_folder=folder and str(folder))
    sample = tiny.records(4, sizes=SIZES)
    engine = Accelerator(cpu=True)
    return choose_cache(model, find_parts(model), encoder, sample, PLAIN, config, engine, seen_once=seen_once)


def test_features_are_chosen_with_the_reason(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model = encoder_of("llava"), frozen(model_of("llava"))
    assert "computed each time (data.cache_features=off)" in chosen(model, encoder, "off").sentence
    once = chosen(model, encoder, "auto", seen_once=True)
    assert "each image is needed once" in once.sentence
    assert once.store is None
    kept = chosen(model, encoder, "auto")
    assert "cached in memory (loss differs by" in kept.sentence
    assert type(kept.store) is FeatureStore
    assert encoder.image_cache is None, "a probe changes nothing"
    model.requires_grad_(True)
    assert "the projector and the vision train" in chosen(model, encoder, "auto").sentence
    frozen(model).model.vision_tower.append = nn.Dropout(0.1)
    assert "gives different features for one image each time" in chosen(model, encoder, "auto").sentence


def test_features_that_other_runs_need_too_are_kept(
    encoder_of: Any, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    """As the trials of a sweep do, each of which may need an image once."""
    found = chosen(frozen(model_of("llava")), encoder_of("llava"), "auto", seen_once=True, folder=tmp_path)
    assert "cached on disk" in found.sentence
    assert list(tmp_path.rglob("*.safetensors"))


def test_the_next_trial_finds_the_features_of_the_one_before(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder = encoder_of("llava")
    for trial in range(2):
        store = chosen(frozen(model_of("llava")), encoder, "auto").store
        assert store is not None
        assert store.computed > 0 if trial == 0 else store.computed == 0


def test_the_check_finds_features_of_another_image(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "_key", lambda source, opened: "one for all")
    found = chosen(frozen(model_of("llava")), encoder_of("llava"), "auto")
    assert "computed each time (loss differs by" in found.sentence


def test_features_on_disk_come_back_bit_equal(encoder_of: Any, model_of: Callable[[str], Any], tmp_path: Path) -> None:
    encoder, model = encoder_of("qwen3_vl"), model_of("qwen3_vl")
    found = []
    for _ in range(2):
        image_cache.STORES.clear()
        encoder = encoder.keeping(features_of(model, encoder, cache_features="disk", cache_folder=str(tmp_path)))
        found.append(padded(encoder, rows(encoder)).inputs)
    assert encoder.image_cache.computed == 0
    outputs = [vars(inputs["mm_encoder_outputs"]["image"]) for inputs in found]
    assert outputs[0].keys() == outputs[1].keys() == {"pooler_output", "deepstack_features"}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert torch.equal(found[0]["image_grid_thw"], found[1]["image_grid_thw"])


def test_what_features_depend_on_is_in_their_fingerprint(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model, engine = encoder_of("llava"), model_of("llava"), Accelerator(cpu=True)

    def mark() -> str:
        return kept.fingerprint(model, find_parts(model), encoder.processor, engine)

    before = mark()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
        assert mark() == before
        model.model.multi_modal_projector.linear_1.weight[0, 0] += 1
    after = mark()
    assert after != before
    size = encoder.processor.image_processor.size
    try:
        encoder.processor.image_processor.size = {"shortest_edge": 112}
        assert mark() != after
    finally:
        encoder.processor.image_processor.size = size


def test_equal_images_share_their_features_by_content(tmp_path: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        tiny.image(seed=seed).save(tmp_path / name)
    a, b, c = (content_key(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    assert content_key((tmp_path / "a.png").read_bytes()) == a


def test_pictures_are_told_apart_by_their_pixels_as_opened() -> None:
    keys = [
        image_cache._key(source, lambda seed=seed: tiny.image(seed=seed))
        for source, seed in (("a", 1), ("b", 1), ("a", 2))
    ]
    assert keys[0] == keys[1] != keys[2]  # one function may give another picture each time


def test_a_file_that_vanished_is_told_with_its_row(
    encoder_of: Any, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    encoder = encoder_of("llava")
    encoder = encoder.keeping(features_of(model_of("llava"), encoder))
    record = tiny.record("What?", "this", [tmp_path / "gone.png"])
    with pytest.raises(DataError, match=f"{record.place}: no such image: .*gone.png"):
        padded(encoder, [record])


def test_one_mark_is_kept_at_a_time(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model = encoder_of("llava"), model_of("llava")
    first = features_of(model, encoder)
    assert features_of(model, encoder).store is first.store
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] += 1
    features_of(model, encoder)
    assert len(image_cache.STORES) == 1
    assert features_of(model_of("llava"), encoder).store is not first.store


# ---------------------------------------------------------------- pixels, where features can't be kept


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_pixels_equal_those_made_anew(family: str, encoder_of: Any, tmp_path: Path) -> None:
    encoder = encoder_of(family)
    layouts = [padded, *([shared] if family in SHARED else [])]
    wanted = [make(encoder, rows(encoder)) for make in layouts]
    for _ in range(2):  # written, then read
        image_cache.STORES.clear()
        config = DataConfig(cache_features="disk", cache_folder=str(tmp_path))
        encoder = encoder.keeping(PixelStore(pixels_mark(encoder.processor, True), config))
        for _ in range(2):
            for make, plain in zip(layouts, wanted, strict=True):
                batch = make(encoder, rows(encoder))
                found, expected = vars(batch), vars(plain)
                assert found.pop("on_host") == expected.pop("on_host", frozenset())
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert encoder.image_cache.computed == 0


def test_pixels_are_kept_on_demand_where_the_tower_trains(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of("llava"), model_of("llava")
    assert "computed each time (the projector and the vision train)" in chosen(model, encoder, "auto").sentence
    kept = chosen(model, encoder, "memory")
    assert "but pixels are, in memory (bit-equal" in kept.sentence
    assert type(kept.store) is PixelStore
    image_cache.STORES.clear()
    monkeypatch.setattr(image_cache, "_key", lambda source, opened: "one for all")
    with pytest.raises(ConfigError, match="cached pixels differ from freshly computed ones; use auto or off"):
        chosen(model, encoder, "memory")


# ---------------------------------------------------------------- the last layer, where labels need it


def whole_loss(model: Any, batch: Any) -> tuple[float, Tensor]:
    """As `loss_and_gradient`, from the logits of every place, as transformers computes them."""
    model.zero_grad(set_to_none=True)
    logits = model(**model_inputs(model, batch)).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", thinned(FAMILIES, 6))
def test_the_last_layer_serves_supervised_tokens_only(
    family: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of(family), model_of(family).train()
    narrowed = losses.last_token_wise(model)
    assert len(narrowed) == 2
    for make in [padded, *([shared] if family in SHARED else [])]:
        batch = make(encoder, rows(encoder))
        loss, gradient = whole_loss(model, batch)
        seen: list[int] = []

        def note(module: Any, args: Any, out: Any, seen: list[int] = seen) -> None:
            seen.append(args[0].shape[:-1].numel())

        hooks = [module.register_forward_hook(note) for module in narrowed]
        found, other = loss_and_gradient(model, batch)
        for hook in hooks:
            hook.remove()
        assert seen == [batch.supervised] * 2
        assert found == pytest.approx(loss, rel=1e-5)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    with monkeypatch.context() as planted:  # an earlier layer's tokens are read by the last one's attention
        first = model.get_decoder().layers[0]
        planted.setattr(losses, "last_token_wise", lambda base: [first.mlp])
        found, other = loss_and_gradient(model, batch)
        assert (other - gradient).norm() > 1e-3 * gradient.norm()
    model.get_decoder().layers[-1].gradient_checkpointing = True
    assert losses.last_token_wise(model) == []
    assert len(losses.last_token_wise(model.eval())) == 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_last_layer_under_lora(
    quantization: str, encoder_of: Callable[[str], Encoder], adapted: Callable[..., Any]
) -> None:
    encoder, model = encoder_of("qwen2_vl"), adapted("qwen2_vl", quantization)
    batch = shared(encoder, rows(encoder))
    loss, gradient = whole_loss(model, batch)
    found, other = loss_and_gradient(model, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()


# ---------------------------------------------------------------- logits in chunks


@pytest.mark.parametrize("family", thinned(FAMILIES, 5))
def test_chunks_of_logits_give_the_whole_loss(
    family: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of(family), model_of(family)
    for make in [padded, *([shared] if family in SHARED else [])]:
        batch = make(encoder, rows(encoder))
        monkeypatch.setattr(losses, "MOST_LOGITS", 2**40)
        loss, gradient = loss_and_gradient(model, batch)
        widest: list[int] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda m, args, out, seen=widest: seen.append(out.shape[:-1].numel()))
        monkeypatch.setattr(losses, "MOST_LOGITS", 3 * head.weight.shape[0])
        found, other = loss_and_gradient(model, batch)
        hook.remove()
        assert found == pytest.approx(loss, rel=1e-5)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
        capped = losses._after_the_head(model.config)
        assert capped == (family in {"paligemma2", "aya_vision"})
        assert (batch.supervised in widest) == capped
        assert (widest.count(3) >= batch.supervised // 3) == (not capped)


# ---------------------------------------------------------------- batches by tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_known_before_images_are_decoded(family: str, encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of(family)
    records = rows(encoder)
    found = [sum(lengths) for lengths in encoder.lengths(records)]
    wanted = [len(ids) for ids in encoder.encode(records, answered=True).input_ids]
    assert found == wanted


# ---------------------------------------------------------------- answers


def answers(model: Any, encoder: Encoder, records: list[Record], share: bool, longest: int = 6) -> list[str]:
    options: dict[str, Any] = {"batch_size": 8, "autocast": nullcontext, "share": share}
    return generate(model, encoder, records, GenerationConfig(max_new_tokens=longest), **options)


@pytest.mark.parametrize("family", sorted(SHARED))
def test_shared_answers_are_those_of_single_rows(family: str, encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model = encoder_of(family), model_of(family)
    records = tiny.records(7, per_image=3, sizes=SIZES)
    assert answers(model, encoder, records, share=True) == answers(model, encoder, records, share=False)
    assert answers_agree(model, encoder, records, Accelerator(cpu=True))


def test_shared_answers_end_each_at_its_own_end(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head whose choice depends on the token seen, so that branches end after different counts of tokens."""
    encoder, model = encoder_of("qwen2_vl"), model_of("qwen2_vl")
    seen: list[list[list[int]]] = []
    monkeypatch.setattr(encoder.answers, "decode", lambda ids: seen.append(ids) or [""] * len(ids))
    end = encoder.answers.end_ids[0]
    torch.manual_seed(0)
    nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    with torch.no_grad():
        model.get_output_embeddings().weight[end] *= 1.5
    records = tiny.records(12, per_image=4, sizes=SIZES)
    for share in (False, True):
        answers(model, encoder, records, share, longest=24)
    pad = encoder.tokenizer.pad_token_id
    plain = [row[: row.index(end) + 1] if end in row else row for batch in seen[:2] for row in batch]
    branches = [row for batch in seen[2:] for row in batch]
    assert branches == plain
    assert len({len(row) for row in branches}) > 1
    assert pad not in {i for row in branches for i in row}


def test_the_check_finds_answers_that_see_other_branches(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of("qwen2_vl"), model_of("qwen2_vl")
    nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    records = tiny.records(8, per_image=4)
    assert answers_agree(model, encoder, records, Accelerator(cpu=True))
    monkeypatch.setattr(
        "vlmtune.batching.inputs.branch_mask", lambda branches: torch.ones(len(branches), 1, 1, 1).bool()
    )
    assert not answers_agree(model, encoder, records, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def pico() -> tuple[Any, Encoder, list[Record]]:
    """The untuned model of the default run, which is right on some of its questions and wrong on others."""
    config, _ = compose.read("train", ["data.max_train_rows=1", "data.max_eval_rows=40"])
    types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    model, processor = load(config.model, tiny.method({}), **types)
    records = table.load(config.data, config.task, 0)["validation"].records
    return model.eval(), Encoder(processor), list(records)


@pytest.mark.parametrize("make", thinned([padded, shared], 1))
def test_drafts_are_what_generation_writes(make: Any, pico: tuple[Any, Encoder, list[Record]]) -> None:
    model, encoder, records = pico
    own = answers(model, encoder, records, share=False)
    assert answers(model, encoder, records, share=True) == own
    batch = make(encoder, records)
    likely = supervised_logits(model, batch)[0].argmax(-1).tolist()
    drafted = Draft(model, encoder, GenerationConfig(max_new_tokens=6)).answers(records, batch, likely)
    right = [answer if answer == record.answers[0] else None for answer, record in zip(own, records, strict=True)]
    assert drafted == right
    assert 0 < drafted.count(None) < len(records)
    never = Draft(model, encoder, GenerationConfig(max_new_tokens=1)).answers(records, batch, likely)
    assert never == [None] * len(records)


def test_no_drafts_where_greedy_search_would_take_other_tokens(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model = encoder_of("qwen2_vl"), model_of("qwen2_vl")
    assert Draft(model, encoder, GenerationConfig()).usable
    assert not Draft(model, encoder, GenerationConfig(temperature=0.7)).usable
    model.generation_config.repetition_penalty = 1.05
    assert not Draft(model, encoder, GenerationConfig()).usable


# ---------------------------------------------------------------- LoRA in one step


@pytest.mark.parametrize("family", sampled(FAMILIES, QUICK))
def test_lora_in_one_step_equals_pefts_own(
    family: str, encoder_of: Callable[[str], Encoder], adapted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = encoder_of(family), adapted(family, "none").train()
    taken: list[bool] = []

    def noting(layer: Any, x: Tensor) -> Any:
        out = lora.in_one_step(layer, x)
        taken.append(out is not None)
        return out

    for make in [padded, *([shared] if family in SHARED else [])]:
        batch = make(encoder, rows(encoder))
        monkeypatch.setattr(adapters, "in_one_step", lambda layer, x: None)
        loss, gradient = loss_and_gradient(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            half, half_gradient = loss_and_gradient(model, batch)
        monkeypatch.setattr(adapters, "in_one_step", noting)
        found, other = loss_and_gradient(model, batch)
        assert found == pytest.approx(loss, rel=1e-5)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
        with torch.autocast("cpu", torch.bfloat16):
            found, other = loss_and_gradient(model, batch)
        assert found == pytest.approx(half, rel=1e-2)
        assert (other - gradient).norm() <= 1.2 * (half_gradient - gradient).norm() + 1e-2 * gradient.norm()
    assert taken
    assert all(taken)


def test_lora_is_left_to_peft_where_it_is_more_than_the_product(
    encoder_of: Callable[[str], Encoder], adapted: Callable[..., Any]
) -> None:
    model = adapted("qwen2_vl", "none")
    layer = next(module for module in model.modules() if type(module).__name__ == "OneStep")
    x = torch.randn(2, 3, layer.in_features)
    assert lora.in_one_step(layer, x) is not None
    assert lora.in_one_step(layer, x.bfloat16()) is None
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    assert lora.in_one_step(layer.train(), x) is None
    torch.testing.assert_close(lora.in_one_step(layer.eval(), x), super(type(layer), layer).forward(x))
    with model.disable_adapter():
        assert lora.in_one_step(layer, x) is None
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))
    assert lora.in_one_step(layer, x) is None
    layer.lora_B["default"].bias = None
    layer.base_layer.weight.requires_grad_(True)
    assert lora.in_one_step(layer, x) is None
    quantized = adapted("qwen2_vl", "nf4")
    assert not [module for module in quantized.modules() if type(module).__name__ == "OneStep"]


# ---------------------------------------------------------------- rewrites


def test_a_convolution_of_single_patches_is_a_matmul() -> None:
    plain = nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14), bias=True)
    fast = PatchMatmul.of(copy.deepcopy(plain))
    for shape in ((5, 3, 2, 14, 14), (2, 3, 4, 28, 14)):  # one patch each, and the general case
        pixels = torch.randn(shape)
        first, second = plain(pixels), fast(pixels)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
        for module, out in ((plain, first), (fast, second)):
            module.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(fast.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)


def test_quick_gelu_in_one_step() -> None:
    plain = QuickGELUActivation()
    fast = QuickGELU(plain)
    x, up = (8 * torch.randn(64, 32, dtype=torch.float64)).requires_grad_(), torch.randn(64, 32, dtype=torch.float64)
    first, second = plain(x), fast(x)
    torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out, x, up)[0] for out in (first, second)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fast, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_lengths_are_rounded_up_where_new_shapes_cost(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    encoder, model, cpu = encoder_of("qwen2_vl"), model_of("qwen2_vl"), torch.device("cpu")
    rounding = Encoder(encoder.processor, pad_to_multiple_of=length_multiple(cpu, torch.bfloat16))
    assert length_multiple(cpu, torch.float32) == length_multiple(torch.device("cuda"), torch.bfloat16) == 1
    for make in (padded, shared):
        plain, longer = make(encoder, rows(encoder)), make(rounding, rows(encoder))
        assert longer.input_ids.shape[1] % 16 == 0
        assert 0 < longer.input_ids.shape[1] - plain.input_ids.shape[1] < 16
        loss, gradient = loss_and_gradient(model, plain)
        found, other = loss_and_gradient(model, longer)
        assert found == pytest.approx(loss, rel=1e-5)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()


def test_freed_memory_is_kept_by_this_c_library() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_model_on_a_cpu_is_rewritten_and_equal(checkpoint_of: Callable[[str], Path], encoder_of: Any) -> None:
    encoder, cpu = encoder_of("qwen2_vl"), torch.device("cpu")
    path = ModelConfig(path=str(checkpoint_of("qwen2_vl")))

    def opened(compute: torch.dtype) -> Any:
        return load(path, tiny.method({}), dtype=compute, compute_dtype=compute, device=cpu)[0].eval()

    fast, half = opened(torch.float32), opened(torch.bfloat16)
    path.rewrites = "off"
    plain, plain_half = opened(torch.float32), opened(torch.bfloat16)
    assert [type(m.model.visual.patch_embed.proj) for m in (fast, plain)] == [PatchMatmul, nn.Conv3d]
    assert [type(m.model.visual.blocks[0].mlp.act) for m in (fast, plain)] == [QuickGELU, QuickGELUActivation]
    assert [m.config._attn_implementation for m in (fast, half, plain_half)] == ["sdpa", ATTENTION, "sdpa"]
    for make in (padded, shared):
        batch = make(encoder, rows(encoder))
        loss, gradient = loss_and_gradient(plain, batch)
        found, other = loss_and_gradient(fast, batch)
        assert found == pytest.approx(loss, rel=1e-6)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
        halves = [summed_loss(model, batch).item() for model in (half, plain_half)]
        assert halves == pytest.approx([loss, loss], rel=1e-2)
        assert abs(halves[0] - loss) <= abs(halves[1] - loss) + 1e-3 * loss


@pytest.mark.parametrize(
    ("setting", "device", "compute", "done"),
    [
        ("auto", "cuda", torch.bfloat16, ["patch embedding as one matmul"]),
        ("on", "cuda", torch.bfloat16, ["patch embedding as one matmul", "quick GELU in one step"]),
        ("off", "cuda", torch.bfloat16, []),
        ("off", "cpu", torch.bfloat16, []),
        ("on", "cpu", torch.float32, ["patch embedding as one matmul", "quick GELU in one step"]),
    ],
)
def test_a_rewrite_says_on_which_devices_it_applies(
    model_of: Callable[[str], Any], setting: str, device: str, compute: torch.dtype, done: list[str]
) -> None:
    """Only modules are replaced, which needs no such device."""
    model = model_of("qwen2_vl")
    assert rewrites.rewrite(model, setting, torch.device(device), compute) == done
    assert type(model.model.visual.patch_embed.proj) is (PatchMatmul if done else nn.Conv3d)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_rewritten_model_computes_the_plain_way_for_a_comparison(
    checkpoint_of: Callable[[str], Path], encoder_of: Any, compute: torch.dtype
) -> None:
    """Bit by bit what `model.rewrites=off` gives, and afterwards the fast way again."""
    batch = padded(encoder_of("qwen2_vl"), rows(encoder_of("qwen2_vl")))

    def opened(rewrites: str) -> Any:
        config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, model={"rewrites": rewrites})
        types = {"dtype": compute, "compute_dtype": compute, "device": torch.device("cpu")}
        model = load(config.model, config.quantization, **types)[0]
        torch.manual_seed(1)
        return adapt(model, config, find_parts(model)).train()

    fast, plain = opened("auto"), opened("off")
    assert (rewrites.is_used(fast), rewrites.is_used(plain)) == (True, False)
    before, (loss, gradient) = loss_and_gradient(fast, batch), loss_and_gradient(plain, batch)
    with rewrites.plain(fast):
        assert not rewrites.is_used(fast)
        found, other = loss_and_gradient(fast, batch)
    assert found == loss
    assert torch.equal(other, gradient)
    assert not torch.equal(before[1], gradient)
    again = loss_and_gradient(fast, batch)
    assert again[0] == before[0]
    assert torch.equal(again[1], before[1])
    rewrites.switch_off(fast)
    assert torch.equal(loss_and_gradient(fast, batch)[1], gradient)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_rewrite_that_fits_badly_is_left_out(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Before anything else is computed with it."""
    sound = PatchMatmul.forward

    def forward(self: PatchMatmul, input: torch.Tensor) -> torch.Tensor:
        if fault == "raises" and not self.plain:
            raise RuntimeError("no such product")
        out = sound(self, input)
        return out if self.plain else out.flip(0)

    monkeypatch.setattr(PatchMatmul, "forward", forward)
    run = tiny.assemble(tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA), tiny.records(4))
    assert not rewrites.is_used(run.model)
    assert len(run.fit().losses) == 3
