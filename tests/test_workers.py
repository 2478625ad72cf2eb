"""Batches made by worker processes: the same ones, in bounded memory, under every way to start a process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils.generic import get_max_seqlen

import grids
import tiny
import tiny_families
from vlmtune import TrainingError
from vlmtune.batching import workers
from vlmtune.batching.layout import Batch, Layout, padded, shared
from vlmtune.batching.loader import Loader
from vlmtune.batching.order import plan
from vlmtune.batching.preparation import Preparation
from vlmtune.batching.workers import Workers
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record
from vlmtune.data.splits import RecordList
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_cache import EncoderOutputs

GB = 10**9


def loader_of(
    encoder: Encoder, records: Sequence[Record], model: Any = None, *, share: bool = True, **trainer: Any
) -> Loader:
    """A loader of two steps for one process without a GPU."""
    settings = TrainerConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=2, **trainer)
    groups = [record.group for record in records]
    steps = plan(settings, groups, [], processes=1, streamed=False, by_group=share)
    return Loader(encoder, RecordList(records), steps, Layout(share), settings, Accelerator(cpu=True), model)


def assert_equal(found: Sequence[Batch], wanted: Sequence[Batch]) -> None:
    for one, other in zip(found, wanted, strict=True):
        values, expected = ({**vars(batch), **batch.inputs, "inputs": [*batch.inputs]} for batch in (one, other))
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name], name


# ---------------------------------------------------------------- where batches are made


def test_forked_workers_make_the_same_batches(encoder_of: Callable[[str], Encoder], model_of: Any) -> None:
    rows, encoder, model = tiny.records(8, per_image=2), encoder_of("qwen2_vl"), model_of("qwen2_vl")
    here = list(loader_of(encoder, rows, model, num_workers=0).micro_batches())
    there = list(loader_of(encoder, rows, model, num_workers=2).micro_batches())
    assert_equal(there, here)
    assert there[0].inputs["pixel_values"].is_shared()
    assert [batch.ends_step for batch in there] == [False, True] * 2


@pytest.mark.parametrize("family", grids.sampled([*tiny.FAMILIES, *tiny_families.FAMILIES], ["qwen2_vl", "llava"]))
def test_a_loader_can_be_sent(family: str, encoder_of: Callable[[str], Encoder], model_of: Any) -> None:
    """With a processor class that is made at run time, cached templates, and the model's positions without weights."""
    rows = tiny.records(8, per_image=2)
    loader = loader_of(encoder_of(family), rows, model_of(family), share=encoder_of(family).family.shares_prefix)
    used = [loader.make(0, 0), loader.make(1, 1)]
    sent = pickle.dumps(loader)
    assert len(sent) < 1.5e6, "no weights"
    again = pickle.loads(sent)
    assert_equal([again.make(0, 0), again.make(1, 1)], used)


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"], indirect=True)
def test_fresh_workers_make_the_same_batches(start: str, encoder_of: Callable[[str], Encoder], model_of: Any) -> None:
    """`forkserver` is the default of Python 3.14 on Linux, `spawn` that of macOS."""
    rows, encoder, model = tiny.records(8, per_image=2), encoder_of("qwen2_vl"), model_of("qwen2_vl")
    here = list(loader_of(encoder, rows, model, num_workers=0).micro_batches())
    assert_equal(list(loader_of(encoder, rows, model, num_workers=2).micro_batches()), here)


@pytest.mark.parametrize("start", ["spawn"], indirect=True)
def test_rows_that_cant_be_sent_stay_here(
    start: str, encoder_of: Callable[[str], Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Record(row.turns, (lambda: tiny.image(),), row.group) for row in tiny.records(8)]
    with caplog.at_level(logging.WARNING, "vlmtune"):
        batches = list(loader_of(encoder_of("llava"), rows, num_workers=2).micro_batches())
    assert len(batches) == 4
    assert "rows are prepared in the main process" in caplog.text
    assert "lambda" in caplog.text


# ---------------------------------------------------------------- what is made


def loss_and_gradients(model: Any, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", grids.sampled([*tiny.FAMILIES, *tiny_families.FAMILIES], ["qwen2_vl", "llava"]))
def test_prepared_batches_give_equal_bits(
    family: str, weights: torch.dtype, encoder_of: Callable[[str], Encoder], model_of: Any
) -> None:
    """Pixels in half the bytes, positions and vision tables from the CPU: loss and gradients are those of the model's
    own, of frozen weights in bfloat16 and of trained ones in float32.
    """
    encoder, model = encoder_of(family), model_of(family).to(weights)
    rows = tiny.records(4, per_image=2, sizes=((56, 56), (112, 56)))
    engine: Any = SimpleNamespace(mixed_precision="bf16")
    for layout in [padded, shared] if encoder.family.shares_prefix else [padded]:
        batch = layout(encoder, rows)
        prepared = Preparation.of(model, engine)(batch)
        assert prepared.inputs["pixel_values"].dtype == torch.bfloat16
        wanted, found = loss_and_gradients(model, batch), loss_and_gradients(model, prepared)
        assert wanted.keys() == found.keys()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_flash_attention_gets_lengths_on_the_device_and_the_longest_as_a_number(
    encoder_of: Callable[[str], Encoder], model_of: Any
) -> None:
    """Its kernel needs the former; transformers would read the latter back (`get_max_seqlen`)."""
    model = model_of("qwen2_5_vl")
    batch = padded(encoder_of("qwen2_5_vl"), tiny.records(2, sizes=((56, 56), (112, 56))))
    model.model.visual.config._attn_implementation = "flash_attention_2"
    prepared = Preparation.of(model, Accelerator(cpu=True))(batch)
    assert prepared.on_host == {"image_grid_thw", "image_max_seqlen", "image_max_window_seqlen"}
    for whole, longest in (("cu_seqlens", "max_seqlen"), ("cu_window_seqlens", "max_window_seqlen")):
        lengths = prepared.inputs[f"image_{whole}"]
        assert lengths.dtype == torch.int32
        config = model.model.visual.config
        assert get_max_seqlen(lengths, config) == prepared.inputs[f"image_{longest}"], longest


def test_pixels_stay_in_fp32_in_a_run_in_fp32(encoder_of: Callable[[str], Encoder], model_of: Any) -> None:
    batch = padded(encoder_of("llava"), tiny.records(2))
    prepared = Preparation.of(model_of("llava"), Accelerator(cpu=True))(batch)
    assert_equal([prepared], [batch])


def test_pixels_of_an_unread_tower_are_left_alone(encoder_of: Callable[[str], Encoder], model_of: Any) -> None:
    """It may compute with them in fp32 before its first product."""
    model, engine = model_of("llava"), SimpleNamespace(mixed_precision="bf16")
    batch = padded(encoder_of("llava"), tiny.records(2))
    model.config.vision_config.model_type = "unread"
    assert_equal([Preparation.of(model, engine)(batch)], [batch])  # type: ignore[arg-type]


def test_what_caches_made_is_pinned_too(monkeypatch: pytest.MonkeyPatch, encoder_of: Callable[[str], Encoder]) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # needs a GPU
    batch = padded(encoder_of("llava"), tiny.records(1))
    batch.inputs["mm_encoder_outputs"] = EncoderOutputs(image=SimpleNamespace(pooler_output=[torch.ones(2)]))
    pinned = batch.pin_memory()
    assert pinned.inputs["mm_encoder_outputs"]["image"].pooler_output[0].is_meta
    assert pinned.input_ids.is_meta


# ---------------------------------------------------------------- shared memory


@pytest.mark.parametrize(
    ("free", "processes", "wanted"),
    [
        (64 * GB, 1, Workers(4, 2)),
        (16 * GB, 1, Workers(4, 2)),  # half of it holds 8 batches
        (15 * GB, 1, Workers(4, 1)),
        (16 * GB, 2, Workers(4, 1)),
        (6 * GB, 1, Workers(3, 1)),
        (1 * GB, 1, Workers(0, 0)),
        (None, 1, Workers(4, 2)),
    ],
)
def test_batches_on_their_way_fit_into_half_of_the_shared_memory(
    free: int | None, processes: int, wanted: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: free)
    found, sentence = Workers.fitting(4, GB, processes)
    assert found == wanted
    assert free is None or found.count * found.ahead * GB <= free / 2 / processes
    assert ("--shm-size" in sentence) == (wanted != Workers(4, 2))


def test_a_container_s_small_shared_memory_is_a_warning(
    encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 1000)
    with caplog.at_level(logging.INFO, "vlmtune"):
        batches = list(loader_of(encoder_of("llava"), tiny.records(8), num_workers=2).micro_batches())
    assert len(batches) == 4
    (line,) = [record for record in caplog.records if "loader" in record.message]
    assert line.levelno == logging.WARNING
    assert "0 processes" in line.message
    assert "--shm-size" in line.message


def test_the_largest_batch_counts(encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the start-up has made with the longest row."""
    sizes: list[int] = []
    real = Workers.fitting
    monkeypatch.setattr(Workers, "fitting", lambda asked, size, ranks: sizes.append(size) or real(asked, size, ranks))
    rows = [*tiny.records(7), tiny.record("Is it " * 99, "yes")]
    loader = loader_of(encoder_of("llava"), rows, num_workers=1)
    first = next(iter(loader.micro_batches()))
    large = loader.around(7)
    list(loader.micro_batches(1))
    assert sizes == [first.bytes, large.bytes]


FULL = """
import torch, sys
import tiny
from pathlib import Path
from vlmtune import TrainingError
from vlmtune.batching import workers
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.processors import load_processor
from vlmtune.config.schema import ModelConfig
from test_workers import loader_of

workers.free_shared_memory = lambda: 10**12  # filled by others after the start
encoder = Encoder(load_processor(ModelConfig(path=sys.argv[1])))
try:
    list(loader_of(encoder, tiny.records(8), num_workers=1).micro_batches())
except TrainingError as error:
    print("said:", error)
"""


@pytest.mark.slow
def test_full_shared_memory_ends_the_run(checkpoint_of: Callable[[str], Path]) -> None:
    """torch would print it in the worker, and wait without end for the batch."""
    mount = "mount -t tmpfs -o size=96k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    run = f'{mount} && exec "$0" -W ignore -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run, sys.executable, FULL, str(checkpoint_of("llava"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "said: /dev/shm is full" in done.stdout, done.stderr
    assert "--shm-size" in done.stdout


def test_a_batch_that_does_not_fit_is_an_error_of_the_run(
    encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(TrainingError, match=r"No space left.*--shm-size"):
        list(loader_of(encoder_of("llava"), tiny.records(8), num_workers=1).micro_batches())
