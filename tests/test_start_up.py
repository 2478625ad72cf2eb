"""The start costs no more than training: what its passes keep, on which rows, without chance, and what short memory
means."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import tiny
from grids import sampled, thinned
from kept import Kept
from vlmtune.batching.groups import groups_of
from vlmtune.batching.layout import PLAIN, Batch, padded, shared
from vlmtune.config.schema import DataConfig
from vlmtune.data.splits import RecordList
from vlmtune.errors import ConfigError, TrainingError
from vlmtune.memory import memory_advice
from vlmtune.models import adapters
from vlmtune.models.chance import varies, without_chance
from vlmtune.models.parts import base_of, find_parts, is_quantized
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import comparison, probes
from vlmtune.proof.comparison import Comparison, agreed, attempted
from vlmtune.proof.decision import decide
from vlmtune.proof.first_pass import check_gradients, check_longest, check_loss
from vlmtune.proof.pairs import pairs, sample_rows
from vlmtune.record import environment

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LIKE = [tiny.record(f"Is it {n}?", "yes it is", [tiny.image(56, 56, n // 2)], f"i{n // 2}") for n in range(8)]
"""Rows of equal length, two an image."""


# ---------------------------------------------------------------- what is kept


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": tiny.LORA},
    "nf4": {"adapter": tiny.LORA, "quantization": tiny.QUANTIZED["nf4"]},
    "all": {},
}
CASES = [*itertools.product(KINDS, (False, True), ("off", "auto"))]


@pytest.mark.parametrize(
    ("kind", "on", "share"), sampled(CASES, [("lora", True, "auto"), ("nf4", True, "off"), ("all", False, "auto")])
)
def test_no_pass_of_the_start_keeps_more_than_training(
    checkpoint_of: Callable[[str], Path], kind: str, on: bool, share: str
) -> None:
    trainer = {"gradient_checkpointing": on, "share_prefix": share, "batch_size": 4, "max_steps": 1}
    config = tiny.config(checkpoint_of("qwen2_vl"), **KINDS[kind], **trainer)
    run = tiny.assemble(config, LIKE)
    model, parts, encoder, loader, engine = run.model, run.parts, run.encoder, run.loader, run.engine
    assert any(map(is_quantized, model.parameters())) == (kind == "nf4")
    assert loader.layout.share == (share == "auto")
    plain, rows = encoder.keeping(None), loader.order.passes(0, 0)[0]
    layout, batch = loader.layout, [loader.records[row] for row in rows]
    passes: dict[str, Callable[[], object]] = {
        "rewrites": lambda: probes.rewrites_agree(model, plain, LIKE[:4], engine),
        "loss": lambda: check_loss(model, plain, LIKE[:4], engine),
        "layout": lambda: probes.layouts_agree(model, plain, batch, engine) if layout.share else None,
        "cache": lambda: probes.choose_cache(model, parts, plain, batch, layout, config, engine, seen_once=False),
        "gradients": lambda: check_gradients(model, parts, encoder, batch, engine, layout),
        "longest": lambda: check_longest(model, loader, rows[:1], engine),
        "all": lambda: decide(model, parts, plain, loader.records, LIKE[:4], config, engine, evaluated=True),
    }
    peaks = {}
    for name, run_pass in passes.items():
        with Kept(model) as kept:
            run_pass()
        assert kept.now == 0, f"{name} leaves a graph behind"
        peaks[name] = kept.peak
    with Kept(model) as training:
        run.fit()
    assert peaks.pop("gradients") == training.peak > 0
    assert max(peaks.values()) <= training.peak, peaks


def test_a_probe_recomputes_as_training_does(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    """In evaluation mode, transformers does not checkpoint: 36 GB in place of 5 for a model of 7 billion weights."""
    model = model_of("qwen2_vl")
    model.activation_checkpointing_enable()
    calls: list[bool] = []
    model.get_decoder().layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, *_: calls.append(module.training)
    )
    assert probes.layouts_agree(model, encoder_of("qwen2_vl"), LIKE[:2], Accelerator(cpu=True))[0]
    assert calls == [True] * 6, "two rows alone and one shared batch, each forward and again in the backward pass"
    assert not any(module.training for module in model.modules())


# ---------------------------------------------------------------- gradients


def vector(model: Any, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def test_the_gap_is_that_of_the_two_gradients(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    model, encoder = model_of("llava"), encoder_of("llava")
    one, other = (lambda rows=rows: padded(encoder, rows) for rows in (LIKE[:2], LIKE[2:4]))
    (loss, first), (another, second) = vector(model, one()), vector(model, other())
    with Comparison(model, Accelerator(cpu=True)).running() as both:
        both.plain([one])
        fits, evidence = both.other([other])
    gaps = abs(loss - another) / loss, float((first - second).norm() / first.norm())
    assert not fits
    assert f"loss differs by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}" in evidence


def test_only_what_is_compared_is_held(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, held = model_of("llava"), []
    monkeypatch.setattr(comparison, "COMPARED", 1000)
    model.register_forward_pre_hook(
        lambda *_: held.append(sum(p.numel() for p in model.parameters() if p.grad is not None))
    )
    assert probes.layouts_agree(model, encoder_of("llava"), LIKE[:2], Accelerator(cpu=True))[0]
    assert held[0] == 0
    assert 0 < max(held) <= 1000
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


# ---------------------------------------------------------------- chance


class Noisy(nn.Module):
    """A layer with one source of chance, which it reads as layers of transformers do."""

    def __init__(self, name: str, *, of_config: bool = False):
        super().__init__()
        owner = self
        if of_config:
            self.config = owner = SimpleNamespace(to_dict=dict)
        setattr(owner, name, 0.5)
        self.rate = lambda: getattr(owner, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.rate(), training=self.training)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        *map(Noisy, ("attention_dropout", "drop_prob", "layerdrop", "router_jitter_noise", "config")),
        Noisy("hidden_dropout", of_config=True),
        nn.BatchNorm1d(8),
    ],
)
def test_chance_is_left_out_and_comes_back(module: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), module), torch.randn(4, 8)
    model.eval()
    before = {key: str(value) for key, value in vars(module).items()}
    wanted = model(x)
    with without_chance(model):
        assert model.training
        assert torch.equal(model(x), wanted)
    assert not model.training
    assert not module.training
    assert {key: str(value) for key, value in vars(module).items()} == before
    model.train()
    assert not torch.equal(model(x), wanted)
    assert varies(module) or hasattr(module.config, "to_dict")


CHANCES = {
    "lora": {"lora_dropout": 0.5},
    "loha": {"rank_dropout": 0.5, "module_dropout": 0.5},
    "lokr": {"rank_dropout": 0.5, "module_dropout": 0.5},
    "oft": {"module_dropout": 0.5, "oft_block_size": 4, "r": 0},
}


@pytest.mark.parametrize("method", thinned(CHANCES, 2))
def test_an_adapter_computes_without_chance(
    method: str, encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    fields = {"method": method, "parts": ["language"], "target_modules": ["k_proj", "up_proj"], **CHANCES[method]}
    model = model_of("qwen2_vl")
    for name, value in (("text_config", 0.4), ("vision_config", 0.3)):
        getattr(model.config, name).attention_dropout = value
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.4
    model = adapters.adapt(model, tiny.config(None, adapter=fields), find_parts(model))
    batch = padded(encoder_of("qwen2_vl"), LIKE[:2])
    with torch.no_grad():
        with without_chance(model):
            again = [float(summed_loss(model, batch)) for _ in range(2)]
        model.train()
        chance = [float(summed_loss(model, batch)) for _ in range(2)]
    assert again[0] == again[1]
    assert chance[0] != chance[1]
    assert probes.layouts_agree(model, encoder_of("qwen2_vl"), LIKE[:4], Accelerator(cpu=True))[0]


# ---------------------------------------------------------------- rows


def test_a_micro_batch_of_one_row_is_compared_with_nothing(
    checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny.config(checkpoint_of("qwen2_vl"), batch_size=1)
    run = tiny.assemble(config, LIKE)
    assert "padded, one row each (trainer.batch_size=1: no two rows are computed together)" in caplog.text
    assert not run.loader.layout.share


def test_evaluation_shares_images_where_training_holds_one_row(
    checkpoint_of: Callable[[str], Path], encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    model, encoder, rows = model_of("qwen2_vl"), encoder_of("qwen2_vl"), RecordList(LIKE)
    found = {}
    for size, share in ((4, "auto"), (1, "auto"), (4, "off")):
        config = tiny.config(checkpoint_of("qwen2_vl"), batch_size=1, eval_batch_size=size, share_prefix=share)
        layout = decide(
            model, find_parts(model), encoder, rows, LIKE[:1], config, Accelerator(cpu=True), evaluated=True
        ).layout
        found[size, share] = layout.share, layout.share_answers
    assert found == {(4, "auto"): (False, True), (1, "auto"): (False, False), (4, "off"): (False, False)}


@pytest.mark.parametrize("tokens", [10, 60, 75, 100, 150, 400])
def test_probes_have_no_more_tokens_than_a_micro_batch(encoder_of: Callable[[str], Encoder], tokens: int) -> None:
    encoder = encoder_of("qwen2_vl")
    rows = RecordList(tiny.records(24, per_image=6))
    trainer = tiny.config(None, batch_tokens=tokens, batch_size=8).trainer
    lengths = encoder.lengths(rows)
    sample = sample_rows(encoder, rows, trainer, most=8)
    assert sample
    assert len(sample) == 1 or padded(encoder, sample).padded_tokens <= tokens
    found = pairs(encoder, rows, groups_of(rows, encoder), 6, lengths=lengths, most_tokens=tokens)
    assert all(shared(encoder, part).padded_tokens <= tokens for part in found)
    assert all(len(part) > 1 for part in found)
    smallest = min(lengths[a][0] + lengths[a][1] + lengths[b][1] for a, b in itertools.combinations(range(6), 2))
    assert bool(found) == (smallest <= tokens)


def test_too_few_tokens_for_two_rows_is_the_reason(encoder_of: Callable[[str], Encoder]) -> None:
    trainer = tiny.config(None, batch_tokens=30).trainer
    found = probes.choose_layout(None, encoder_of("qwen2_vl"), [], trainer, Accelerator(cpu=True), evaluated=True)
    assert "no two rows are known to share a prompt up to an image and to fit into 30 tokens" in found.sentence


# ---------------------------------------------------------------- short memory


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


SHORT = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_short_memory_in_a_comparison_is_its_reason(error: Exception) -> None:
    def compare() -> comparison.Verdict:
        raise error

    assert attempted(compare, "the shared layout") == (False, "out of memory while trying the shared layout")


def test_short_memory_in_a_probe_means_the_plain_way(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    encoder, model = encoder_of("qwen2_vl"), model_of("qwen2_vl").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.get_decoder().register_forward_pre_hook(full)
    config = tiny.config(None)
    layout = probes.choose_layout(model, encoder, [LIKE[:2]], config.trainer, Accelerator(cpu=True), evaluated=True)
    assert layout.sentence == "batches    padded, one row each (out of memory while trying the shared layout)"
    assert not probes.choose_answers(model, encoder, [LIKE[:2]], Accelerator(cpu=True))
    assert "does not share images: out of memory while trying several answers over one image" in caplog.text
    cached = probes.choose_cache(
        model, find_parts(model), encoder, LIKE, PLAIN, config, Accelerator(cpu=True), seen_once=False
    )
    assert cached.store is None
    assert "computed each time (out of memory while trying features in place of pixels)" in cached.sentence
    assert all(p.grad is None for p in model.parameters())


def test_short_memory_for_what_is_required_is_an_error(
    encoder_of: Callable[[str], Encoder], model_of: Callable[[str], Any]
) -> None:
    encoder, model = encoder_of("qwen2_vl"), model_of("qwen2_vl").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.get_decoder().register_forward_pre_hook(full)
    config = tiny.config(None, share_prefix="on")
    config.data = DataConfig(cache_features="memory")
    with pytest.raises(ConfigError, match=r"share_prefix=on: out of memory while trying the shared layout; use auto"):
        probes.choose_layout(model, encoder, [LIKE[:2]], config.trainer, Accelerator(cpu=True), evaluated=True)
    with pytest.raises(ConfigError, match=r"cache_features=memory: out of memory while trying features"):
        probes.choose_cache(
            model, find_parts(model), encoder, LIKE, PLAIN, config, Accelerator(cpu=True), seen_once=False
        )


def test_short_memory_for_rewrites_leaves_them_out(
    checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny.assemble(tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA), LIKE)
    caplog.set_level(logging.INFO)
    assert probes.rewrites_agree(run.model, run.encoder, LIKE, run.engine)
    base_of(run.model).register_forward_pre_hook(full)
    assert not probes.rewrites_agree(run.model, run.encoder, LIKE, run.engine)
    assert "rewrites   not used (out of memory while trying faster forms of its modules)" in caplog.text


@pytest.mark.parametrize("own", [True, False])
def test_one_rank_without_memory_decides_for_all(own: bool) -> None:
    """Each rank asks, whatever it found: one that did not would leave the others waiting."""

    class OneOfTwo:
        num_processes, device, asked = 2, torch.device("cpu"), 0

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            self.asked += 1
            return tensor  # the other rank says no

    engine: Any = OneOfTwo()
    fits, reason = agreed((own, "what this rank found"), engine)
    assert not fits
    assert engine.asked == 1
    assert ("another process" in reason) == own


def test_advice_leaves_out_what_is_on(
    checkpoint_of: Callable[[str], Path], encoder_of: Callable[[str], Encoder]
) -> None:
    def advice(**trainer: Any) -> str:
        config = tiny.config(checkpoint_of("qwen2_vl"), **trainer)
        with pytest.raises(TrainingError) as found, memory_advice(config.saves_memory):
            full()
        return str(found.value)

    bare = advice(adapter=None)
    assert "trainer.gradient_checkpointing=true" in bare
    assert "a smaller trainer.batch_size" in bare
    assert "adapter=lora, quantization=nf4 or a smaller model" in bare
    assert "batch_tokens" not in bare
    saving = advice(
        adapter=tiny.LORA,
        quantization=tiny.QUANTIZED["nf4"],
        gradient_checkpointing=True,
        batch_size=1,
        eval_batch_size=1,
    )
    assert saving == ("out of device memory. Less is needed with a smaller model.image.max_tokens or a smaller model")
    assert "a smaller trainer.batch_tokens" in advice(batch_tokens=100)


# ---------------------------------------------------------------- the figures


def test_the_start_has_its_own_peak() -> None:
    peak = environment.Peak()
    peak.start()
    block = torch.ones(60_000_000)
    peak.end_startup()
    del block
    assert peak.startup is not None
    assert peak.startup["startup_peak_rss_bytes"] > 240_000_000
    assert peak.startup["startup_peak_device_bytes"] == 0
    peak.start()
    assert peak.startup is None


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_gpus_libraries_run_out_of_memory_too(text: str) -> None:
    with pytest.raises(TrainingError, match=r"out of device memory\. Less is needed"), memory_advice():
        raise RuntimeError(text)
