"""benchmarks/gpu.py: its arithmetic, what it does where a run fails, and a whole table on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_work

    return gpu_work


def test_flops_are_those_that_torch_counts(work: Any) -> None:
    """A forward and backward pass over all weights. torch counts the masked half of the attention too, and the patch
    embedding's input needs no gradient."""
    shape, side, text = work.SHAPES["tiny"], 6, 9
    config = work.model_config(shape, IDS, end=1)
    config._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(config).train()
    image = side * side
    ids = torch.tensor([[7, *[5] * image, 8, *range(10, 10 + text - 2)]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 5).int(),
        "pixel_values": torch.randn(4 * image, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
    }
    with FlopCounterMode(display=False) as counter:
        model(**inputs, labels=ids).loss.backward()
    masked = 3 * 2 * (image + text) ** 2 * shape.hidden * shape.layers
    unneeded = 2 * (2 * 3 * 14 * 14 * shape.tower) * 4 * image
    found = work.flops(shape, image, text, all_weights=True)
    assert counter.get_total_flops() == pytest.approx(found + masked - unneeded, rel=0.01)
    assert work.flops(shape, image, text, all_weights=False) < 0.6 * found


@pytest.mark.parametrize(("size", "weights"), [("2b", 2.44e9), ("7b", 8.29e9)])
def test_models_have_the_sizes_of_the_published_ones(work: Any, size: str, weights: float) -> None:
    """Qwen2-VL 2B has 2.21 billion, and its head is its embedding; here it is another matrix."""
    shape = work.SHAPES[size]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(work.model_config(shape, IDS, end=1))
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(weights, rel=0.01)
    assert shape.decoder + 2 * shape.head + shape.vision + shape.merger == pytest.approx(found, rel=0.001)


def test_shards_hold_all_weights_once(work: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work, "SHARD", 1000)
    shapes = {
        name: torch.Size(shape) for name, shape in {"a": (20, 20), "b": (20, 20), "c": (5,), "d.bias": (5,)}.items()
    }
    assert list(work.in_shards(shapes)) == [["a"], ["b", "c", "d.bias"]]
    work.write_shards(shapes, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(shapes)
    assert sorted(set(index["weight_map"].values())) == sorted(f.name for f in tmp_path.glob("*.safetensors"))


def test_a_run_that_takes_too_long_is_ended_and_says_where_it_was(gpu: Any) -> None:
    budget = gpu.Budget(None)
    budget.end = time.monotonic() + 1
    lines = 'print(\'{"bench": {"phase": "first step"}}\', flush=True); import time; time.sleep(60)'
    began = time.monotonic()
    code, out, _ = budget.run("kind", [sys.executable, "-c", lines], {})
    assert (code, gpu.said(out)) == (None, [{"phase": "first step"}])
    assert time.monotonic() - began < 20
    assert "s left" in budget.lacks("kind")
    assert gpu.Budget(None).lacks("kind") is None


def test_rows_that_this_machine_cannot_run_say_why(gpu: Any) -> None:
    cases = {case.name: case for case in gpu.CASES}
    machine = {"device": "NVIDIA H100 80GB HBM3", "cuda": True, "versions": {"torch": "2.11"}}
    assert gpu.peak(machine["device"]) == 989e12
    assert gpu.hindrance(cases["nf4"], machine) == gpu.hindrance(cases["all"], machine) == "bitsandbytes not installed"
    assert gpu.hindrance(cases["lora"], machine) == ""
    assert (
        gpu.missing(gpu.NEEDS["vlmtune"], machine)
        == "peft, PIL, jinja2, hydra, omegaconf, pydantic, rich, pandas not installed"
    )
    [first, *others] = gpu.cells({"failed": "at start-up: out of memory"})
    assert first == "failed at start-up: out of memory"
    assert len(others) == len(gpu.COLUMNS) - 4
    assert not any(others)


def test_values_replace_those_of_the_cases(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["gpu.py", "--cases", "lora", "flex", "--batch", "1", "2", "--checkpointing", "off", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", words)
    found = list(gpu.chosen(gpu.parsed()))
    assert [(case.name, case.batch) for case in found] == [("lora", 1), ("lora", 2), ("flex", 1), ("flex", 2)]
    assert {(case.rank, case.checkpointing) for case in found} == {(8, False)}
    assert found[0].contenders == ("trainer", "trl", "vlmtune")
    assert found[2].contenders == ("vlmtune",)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_those_that_fake_tensors_count(
    work: Any, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """At 2B's width with fewer layers. LoRA's gradients come as activations go, so they are at most added."""
    import gpu_count
    import gpu_memory

    shape = replace(work.SHAPES["2b"], layers=2)
    monkeypatch.setitem(gpu_memory.MODELS, "2b", shape)
    setting = gpu_memory.Setting("", "2b", "lora", checkpointing=checkpointing)
    found = gpu_count.peak(shape, setting.image + setting.text, checkpointing=checkpointing)
    computed = gpu_memory.activations(setting)
    assert 0.9 * computed < found < 1.1 * computed + 4 * gpu_memory.lora(shape, setting.rank)


def test_the_page_has_the_tables_that_the_script_prints(work: Any) -> None:
    import gpu_memory

    page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    for table in (gpu_memory.table(), gpu_memory.arithmetic(), gpu_memory.counted()):
        assert table in page, "run python benchmarks/gpu_memory.py and copy what it prints"


@pytest.mark.slow
def test_a_table_on_a_cpu(gpu: Any, tmp_path: Path) -> None:
    """Each step of the contenders has the same rows, so their losses are equal before LoRA's first step."""
    raw = tmp_path / "raw.jsonl"
    script = [sys.executable, str(BENCHMARKS / "gpu.py"), "--sizes", "tiny", "--images", "4x4", "--steps", "5"]
    script += ["--cases", "swift", "shared", "nf4", "--evaluated", "4", "--accumulation", "2", "--batch", "4"]
    script += ["--contenders", "trainer", "vlmtune", "--workers", "0", "--raw", str(raw)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MFU = rows/s x FLOPs" in done.stdout
    header, *rows = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert tuple(header) == gpu.COLUMNS
    assert {len(row) for row in rows} == {len(header)}
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [run["skipped"] for run in runs if run["name"] == "nf4"] == ["nf4 is measured on a GPU only"] * 2
    measured = [run for run in runs if run["name"] != "nf4"]
    assert [(run["name"], run["contender"]) for run in measured] == [
        (name, contender) for name in ("swift", "shared") for contender in ("trainer", "vlmtune")
    ], done.stdout
    for plain, ours in zip(measured[::2], measured[1::2], strict=True):
        assert len(plain["losses"]) == len(ours["losses"]) == 5
        assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-4)
        for run in (plain, ours):
            assert run["rows_per_second"] > 0
            assert run["tokens_per_second"] == run["rows_per_second"] * (16 + run["text_tokens"])
            assert 0 <= run["data_wait_share"] < 1
            assert run["driver"] > 0
            assert run["start_driver"] > 0
            assert run["evaluation_driver"] > 0
            assert run["losses"][-1] < run["losses"][0]
