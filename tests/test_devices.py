"""The machine a run is on: which devices it uses, in which number types, and what it imports for that.

No GPU is at hand here, so what CUDA would answer is put in its place.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.import_utils
import pytest
import torch
from accelerate import PartialState

import tiny
from vlmtune import run as page
from vlmtune.config.schema import TrainerConfig
from vlmtune.errors import ConfigError
from vlmtune.launch import session, surroundings, tf32
from vlmtune.launch.world import World
from vlmtune.models.adapters import adapt
from vlmtune.models.load import load
from vlmtune.models.parts import find_parts
from vlmtune.packages import import_bitsandbytes, without_bitsandbytes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def weights(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen2_vl")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Puts a GPU in place that has bfloat16 or only emulates it, as every card since 2012 does."""

    def put(bf16: bool) -> None:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return put


# ---------------------------------------------------------------- number types


@pytest.mark.parametrize(
    ("precision", "bf16", "wanted"),
    [("auto", True, "bf16"), ("auto", False, "fp16"), ("fp16", True, "fp16"), ("fp32", False, "no")],
)
def test_a_gpu_computes_in_what_it_has(
    card: Callable[[bool], None], precision: str, bf16: bool, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    """T4 and V100 have no bfloat16; torch says they do, and emulates it."""
    card(bf16)
    with caplog.at_level(logging.INFO, "vlmtune"):
        assert session.mixed_precision(tiny.config(None, precision=precision), GPU) == wanted
    assert ("computing in fp16: Tesla T4 has no bfloat16" in caplog.text) == (precision == "auto" and not bf16)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"precision": "bf16"}, r"trainer\.precision=bf16: this GPU has no bfloat16; use fp16 or fp32"),
        ({"precision": "auto", "model": {"dtype": "bf16"}}, r"model\.dtype=bf16: this GPU has no bfloat16; use auto"),
    ],
)
def test_bfloat16_is_refused_where_it_would_be_emulated(
    card: Callable[[bool], None], keys: dict[str, Any], message: str
) -> None:
    card(False)
    with pytest.raises(ConfigError, match=message):
        session.mixed_precision(tiny.config(None, **keys), GPU)


def test_cuda_is_asked_once_the_rank_has_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before, each rank would open a context of some 400 MB on the first GPU."""
    real, seen = session.mixed_precision, []

    def asking(config: Any, device: torch.device) -> str:
        seen.append((PartialState().initialized, PartialState().device == device))
        return real(config, device)

    monkeypatch.setattr(session, "mixed_precision", asking)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    session.engine(tiny.config(None))
    assert seen == [(True, True)]


@pytest.mark.parametrize("beside", [{"modules_to_save": ["norm"]}, {"bias": "all"}])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "auto"), ("fp32", "fp16")])
def test_what_trains_beside_an_adapter_is_in_full_too(
    weights: Path, beside: dict[str, Any], precision: str, dtype: str
) -> None:
    """PEFT leaves it in the base's type: bf16 drops small steps, and the scaler refuses fp16 at the first step."""
    config = tiny.config(weights, adapter=tiny.LORA | beside, precision=precision, model={"dtype": dtype})
    model, _ = load(config.model, config.quantization, **session.dtypes(config, session.engine(config)), device=CPU)
    adapted = adapt(model, config, find_parts(model))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    half = torch.bfloat16 if dtype == "auto" else torch.float16
    assert half in {p.dtype for p in adapted.parameters() if not p.requires_grad}


# ---------------------------------------------------------------- TF32


def products() -> tuple[Any, ...]:
    """Torch's switches, as they are read."""
    try:
        older: Any = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        older = None
    return older, *(switch.fp32_precision for switch in tf32._switches())


@pytest.mark.parametrize(
    ("device", "mixed", "asked", "wanted"),
    [
        ("cuda", "no", True, "high"),
        ("cuda", "no", False, "highest"),
        ("cuda", "bf16", True, "highest"),
        ("cpu", "no", True, "highest"),
    ],
)
def test_float32_runs_on_a_gpu_train_in_tf32(
    monkeypatch: pytest.MonkeyPatch, device: str, mixed: str, asked: bool, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    engine: Any = SimpleNamespace(device=torch.device(device), mixed_precision=mixed)
    before = products()
    with surroundings.kept(), caplog.at_level(logging.INFO, "vlmtune"):
        session.use_tf32(TrainerConfig(tf32=asked), engine)
        assert torch.get_float32_matmul_precision() == wanted
        assert torch.backends.cudnn.allow_tf32 == (wanted == "high")
    assert ("TF32" in caplog.text) == (wanted == "high")
    assert products() == before


@pytest.mark.parametrize("caller", ["nothing", "older", "newer", "newest"])
def test_the_callers_tf32_decides_nothing_and_is_given_back(caller: str) -> None:
    """Torch raises where one of its three switches is read after another one was set."""
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    tf32._restore(("highest", True, ["none", "none", "tf32", "tf32"]))  # as torch has it at first
    first = products()
    if caller == "older":
        torch.set_float32_matmul_precision("medium")
    elif caller == "newer":
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    elif caller == "newest":
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    before = products()
    try:
        with surroundings.kept():
            assert products() == (("highest", False), "ieee", "ieee", "ieee", "ieee")
            tf32.use(True)
            assert products() == (("high", True), "tf32", "tf32", "tf32", "tf32")
        assert products() == before
    finally:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        tf32._restore(("highest", True, ["none", "none", "tf32", "tf32"]))
    assert products() == first


def test_checks_compare_in_full_before_training_computes_in_tf32(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-3 is allowed between two float32 gradients: TF32's own rounding is as large."""
    order: list[str] = []
    check, use = page.proof.prove_passes, session.use_tf32
    monkeypatch.setattr(page.proof, "prove_passes", lambda *values: order.append("checked") or check(*values))
    monkeypatch.setattr(session, "use_tf32", lambda *values: order.append("tf32") or use(*values))
    tiny.assemble(tiny.config(weights), tiny.records(4))
    assert order == ["checked", "tf32"]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(("processes", "devices"), [(1, 0), (4, 0), (1, 8), (8, 8)])
def test_each_process_has_a_gpu_or_all_are_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, processes: int, devices: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    session.check_devices(World(processes=processes, processes_here=processes))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would say `Duplicate GPU detected` at the first exchange."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"4 processes on a machine with 2 usable GPUs: each needs its own; start 2 "):
        session.check_devices(World(processes=8, processes_here=4))


@pytest.mark.parametrize(("processes", "devices", "said"), [(1, 8, True), (8, 8, False), (1, 1, False)])
def test_gpus_without_work_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, processes: int, devices: int, said: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)  # of those in CUDA_VISIBLE_DEVICES
    engine: Any = SimpleNamespace(num_processes=processes)
    with caplog.at_level(logging.INFO, "vlmtune"):
        session.log_idle_devices(engine, True)
        session.log_idle_devices(engine, False)  # answers are written by one process
    line = f"computing on one of {devices} GPUs; backend=accelerate uses all of them"
    assert caplog.messages == [line] * said


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_accelerators_that_are_not_used_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Nothing was ever run on them, and the CPU is slow, but right."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with caplog.at_level(logging.INFO, "vlmtune"):
        assert session.engine(tiny.config(None)).device.type == "cpu"
    assert f"computing on the CPU: this machine has {kind}" in caplog.text


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_drops_for_itself(rank: int) -> None:
    """In each step anew, whatever was drawn before."""

    def draws(seed: int, rank: int, step: int) -> list[float]:
        engine: Any = SimpleNamespace(process_index=rank)
        session.seed_step(seed, engine, step)
        return torch.rand(3).tolist()

    with surroundings.kept():
        own = draws(7, rank, 5)
        assert draws(7, rank, 5) == own
        assert own not in (draws(7, rank + 1, 5), draws(7, rank, 6), draws(8, rank, 5))


# ---------------------------------------------------------------- bitsandbytes

BROKEN = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).write_text("imported")
raise OSError("libcudart.so.99: cannot open shared object file")
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once a process has imported bitsandbytes, which is broken in this one and its children."""
    package = tmp_path / "broken" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    return tmp_path / "mark"


def test_peft_finds_no_bitsandbytes_until_a_run_needs_it(mark: Path) -> None:
    with without_bitsandbytes():
        assert not peft.import_utils.is_bnb_available()
        assert not peft.import_utils.is_bnb_4bit_available()
        with without_bitsandbytes(), pytest.raises(ModuleNotFoundError):
            importlib.import_module("bitsandbytes")
        assert importlib.util.find_spec("bitsandbytes") is None
    assert peft.import_utils.is_bnb_available()
    assert not mark.exists()


def test_a_bitsandbytes_that_is_in_use_is_left_alone() -> None:
    assert importlib.import_module("bitsandbytes")
    with without_bitsandbytes():
        assert peft.import_utils.is_bnb_4bit_available()


NEEDED = [
    ({"quantization": {"method": "bitsandbytes_4bit"}}, "quantization.method=bitsandbytes_4bit"),
    ({"quantization": {"method": "bitsandbytes_8bit"}}, "quantization.method=bitsandbytes_8bit"),
    ({"optimizer": {"name": "adamw_8bit"}}, "optimizer.name=adamw_8bit"),
    ({"optimizer": {"name": "paged_adamw"}}, "optimizer.name=paged_adamw"),
    ({"adapter": {**tiny.LORA, "init_lora_weights": "loftq"}}, "adapter.init_lora_weights=loftq"),
]


@pytest.mark.parametrize(("keys", "said"), NEEDED)
def test_a_broken_bitsandbytes_stops_a_run_that_needs_it(mark: Path, keys: dict[str, Any], said: str) -> None:
    """At the start, with the key, before a model is loaded."""
    with pytest.raises(ConfigError) as raised:
        session.engine(tiny.config(None, **keys))
    assert str(raised.value).startswith(
        f"{said}: needs bitsandbytes, which can't be imported: OSError: libcudart.so.99"
    )
    assert mark.exists()


@pytest.mark.parametrize(
    ("keys", "trains"),
    [({"adapter": tiny.LORA}, True), ({}, True), ({"quantization": {"method": "hqq"}}, True)]
    + [(keys, False) for keys, _ in NEEDED[2:]],
)
def test_no_other_run_imports_it(mark: Path, keys: dict[str, Any], trains: bool) -> None:
    session.engine(tiny.config(None, **keys), trains=trains)
    assert not mark.exists()


def test_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"model\.path: stored in 4 bits: needs bitsandbytes, .* ModuleNotFoundError"):
        import_bitsandbytes("model.path: stored in 4 bits")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "ia3", "adalora", "vera", "none"])
def test_a_broken_bitsandbytes_does_not_stop_other_runs(mark: Path, tmp_path: Path, adapter: str) -> None:
    program = "import sys, vlmtune; r = vlmtune.train(sys.argv[1:]); vlmtune.load(r['folder']); print(r['status'])"
    words = [f"adapter={adapter}", "tracker=none", "trainer.max_steps=20", "trainer.batch_size=2"]
    words += ["data.max_train_rows=40", "data.max_eval_rows=2", "generation.max_new_tokens=2"]
    words += ["trainer.eval_baseline=false", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"
    assert not mark.exists()
