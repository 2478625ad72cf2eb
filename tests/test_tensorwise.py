"""bf16 weights train as fp32 ones do, and a step that saves memory is the plain step bit by bit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from grids import thinned
from vlmtune.errors import ConfigError
from vlmtune.launch import session
from vlmtune.models.parts import Parts
from vlmtune.training.optim import build_optimizer
from vlmtune.training.tensorwise import Tensorwise, round_to_bf16

BF16: dict[str, Any] = {"model": {"dtype": "bf16"}, "precision": "bf16"}


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen2_vl")


def built(model: torch.nn.Module, rate: float, **optimizer: Any) -> Any:
    config = tiny.config(None, learning_rate=rate, optimizer=optimizer)
    parts, engine = Parts({"": "language"}), session.engine(config)
    return build_optimizer(model, parts, config.trainer, config.optimizer, engine)


def moved(dtype: torch.dtype, steps: int, rate: float, **optimizer: Any) -> torch.Tensor:
    """How far weights of 0.02 [64, 64] go in `steps` with the same random gradient."""
    model = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    torch.nn.init.constant_(model.weight, 0.02)
    made = built(model, rate, **optimizer)
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(steps):
        model.weight.grad = gradient.clone()
        made.step()
    return model.weight.detach().float() - torch.tensor(0.02, dtype=dtype).float()


# ---------------------------------------------------------------- bf16 weights


@pytest.mark.parametrize(
    ("name", "steps", "rate"), [("adamw", 500, 1e-5), ("adamw_8bit", 125, 4e-5), ("muon", 60, 1e-4)]
)
def test_small_steps_move_bf16_weights_as_fp32_ones(name: str, steps: int, rate: float) -> None:
    """At 0.02 bf16's values are 1.2e-4 apart: a step of 1e-5 to the nearest of them goes nowhere."""
    wanted = moved(torch.float32, steps, rate, name=name)
    found = moved(torch.bfloat16, steps, rate, name=name)
    assert wanted.norm() > 64 * 1e-3, "about 0.001 per weight at least"
    assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.03)
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=3e-5)


def test_nearest_rounding_loses_small_steps_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlmtune"):
        assert not moved(torch.bfloat16, 50, 1e-5, rounding="nearest").any()
    assert "an update below 1/512 of a weight is lost" in caplog.text
    caplog.clear()
    assert moved(torch.float32, 50, 1e-5, rounding="nearest").all()
    assert not caplog.text, "fp32 weights lose nothing"


def test_the_layout_of_a_weight_changes_nothing() -> None:
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = torch.nn.Conv2d(4, 4, 3, bias=False)
        torch.nn.init.constant_(model.weight, 0.02)
        model = model.to(dtype=torch.bfloat16, memory_format=layout)
        made = built(model, 1e-5)
        for step in range(3):
            gradient = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(step)).bfloat16()
            model.weight.grad = gradient.to(memory_format=layout)
            made.step()
        weights.append(model.weight.detach())
    assert weights[0].stride() != weights[1].stride()
    assert torch.equal(*weights)


def test_rounding_keeps_the_mean() -> None:
    """Each result is one of the two neighbours in bf16, and their mean over many is the value."""
    values = torch.tensor([1.0, 1.001, -1.001, 0.02, -3e-5, 1e-30, 255.7, 0.0])
    many = values.repeat(20_000, 1)
    round_to_bf16(many, torch.Generator().manual_seed(0))
    assert torch.equal(many, many.bfloat16().float()), "values of bf16"
    space = values.abs() * 2**-7
    assert ((many - values).abs() <= space).all()
    assert ((many.mean(0) - values).abs() <= space * 0.02).all()
    assert torch.equal(many[:, 0], torch.ones(20_000)), "what bf16 has is not moved"
    infinite = torch.tensor([torch.inf, -torch.inf])
    round_to_bf16(infinite, torch.Generator())
    assert infinite.tolist() == [torch.inf, -torch.inf]
    wrong = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1] * 50, dtype=torch.int32).view(torch.float32)  # a GPU's, a CPU's
    round_to_bf16(wrong, torch.Generator())
    assert wrong.isnan().all()


def test_the_seed_decides_the_noise() -> None:
    def trained(seed: int) -> torch.Tensor:
        model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        torch.nn.init.constant_(model.weight, 0.02)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-5)
        made = Tensorwise(inner, stochastic=True, offload=False, in_backward=False, seed=seed)
        before = torch.get_rng_state()
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            made.step()
        assert torch.equal(torch.get_rng_state(), before), "or dropout would depend on it"
        return model.weight.detach()

    assert torch.equal(trained(0), trained(0)), "so that ranks agree"
    assert not torch.equal(trained(0), trained(1))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_bytes_of_a_trained_weight(kind: str) -> None:
    """bf16 weight and gradient, and the state: two numbers in fp32, or in 8 bits with a scale for each 256."""
    model = torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    made = built(model, 1e-5, name=kind)
    model.weight.grad = torch.ones_like(model.weight)
    made.step()
    state = [value for value in made.state[model.weight].values() if torch.is_tensor(value) and value.numel() > 256]
    held = [model.weight, model.weight.grad, *state]
    found = sum(tensor.nbytes for tensor in held) / model.weight.numel()
    assert found == pytest.approx({"adamw": 12, "adamw_8bit": 6}[kind], abs=0.05)


def test_fp16_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights in fp16 can't be trained"):
        built(torch.nn.Linear(2, 2, dtype=torch.float16), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_weights_learn_what_fp32_ones_do(folder: Path, seed: int) -> None:
    """40 steps: from a loss of 7.03 to 2.93 in fp32, to 2.94 with stochastic and to 4.91 with nearest rounding."""

    def last(*, model: dict[str, Any] | None = None, **more: Any) -> float:
        frozen = {"freeze": ["vision", "projector"], **(model or {})}
        steps: dict[str, Any] = {"max_steps": 40, "batch_size": 8, "learning_rate": 2e-4, "scheduler": tiny.CONSTANT}
        run = tiny.assemble(tiny.config(folder, model=frozen, seed=seed, **steps, **more), tiny.records(8))
        return sum(run.fit().losses[-5:]) / 5

    wanted = last()
    assert last(**BF16) == pytest.approx(wanted, rel=0.02)
    assert last(**BF16, optimizer={"name": "adamw_8bit"}) == pytest.approx(wanted, rel=0.02)
    assert last(**BF16, optimizer={"rounding": "nearest"}) > 1.3 * wanted


# ---------------------------------------------------------------- memory for time


@pytest.mark.parametrize(
    ("option", "more"),
    thinned(
        [
            ({"step_in_backward": True}, {}),
            ({"step_in_backward": True, "name": "adamw_8bit"}, BF16),
            ({"step_in_backward": True, "name": "muon"}, {}),
            ({"step_in_backward": True}, {"adapter": tiny.LORA}),
            ({"step_in_backward": True}, {"gradient_checkpointing": True, **BF16}),
            ({"offload": True}, {}),
            ({"offload": True, "step_in_backward": True}, BF16),
        ],
        4,
    ),
)
def test_it_is_the_plain_step_bit_by_bit(folder: Path, option: dict[str, Any], more: dict[str, Any]) -> None:
    def trained(optimizer: dict[str, Any]) -> tiny.Run:
        config = tiny.config(folder, optimizer=optimizer, max_grad_norm=None, **more)
        return tiny.assemble(config, tiny.records(8)).fit()

    run, plain = trained(option), trained({key: value for key, value in option.items() if key == "name"})
    assert run.losses == plain.losses
    wanted = plain.weights()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run.weights().items())
    tolerance = 1e-2 if more.get("precision") == "bf16" else 1e-6  # torch's norm of bf16 gradients is a bf16 number
    for report, other in zip(run.reports, plain.reports, strict=True):
        assert report.gradient_norm == pytest.approx(other.gradient_norm, rel=tolerance)


def test_a_step_in_backward_leaves_no_gradient(folder: Path) -> None:
    """None is left when the backward pass ends, and few exist at any time in it."""
    config = tiny.config(folder, optimizer={"step_in_backward": True}, max_grad_norm=None)
    run = tiny.assemble(config, tiny.records(4))
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in run.model.parameters()))

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    run.fit(before_zero_grad=lambda _: count(torch.empty(0)))
    assert most == 0, "each was freed before the next was complete"


def test_a_second_gradient_of_a_step_is_noticed() -> None:
    model = torch.nn.Linear(2, 2)
    built(model, 1e-3, step_in_backward=True)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(AssertionError, match="a second gradient"):
        model(torch.ones(2)).sum().backward()


def test_offloaded_weights_are_updated_on_the_cpu() -> None:
    """`meta` stands for an accelerator."""
    weight = torch.nn.Parameter(torch.empty(4, 4, device="meta", dtype=torch.bfloat16))
    for stochastic, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        options: dict[str, Any] = {"stochastic": stochastic, "in_backward": False, "seed": 0}
        made = Tensorwise(torch.optim.AdamW([weight]), offload=True, **options)
        assert made._computed_in(weight) == (torch.device("cpu"), dtype)
        assert made._placed("exp_avg", torch.ones(4, 4), weight).device.type == "cpu"
        here = Tensorwise(torch.optim.AdamW([weight]), offload=False, **options)
        assert here._computed_in(weight) == (torch.device("meta"), dtype)
        assert here._placed("exp_avg", torch.ones(4, 4), weight).device.type == "meta"


# ---------------------------------------------------------------- state


def stepped(model: torch.nn.Module, **optimizer: Any) -> Any:
    made = built(model, 1e-3, **optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
    made.step()
    return made


def test_paged_state_is_paged_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paged memory needs CUDA; here a mark stands for it. bitsandbytes' own loading makes plain tensors of it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def paged(_: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.marked = True  # type: ignore[attr-defined]
        return buffer

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", paged)
    model = torch.nn.Linear(512, 256)
    saved = stepped(model, name="paged_adamw_8bit")
    again = built(model, 1e-3, name="paged_adamw_8bit")
    again.load_state_dict(saved.state_dict())
    for parameter in model.parameters():
        for name in ("state1", "state2"):
            found, wanted = again.state[parameter][name], saved.state[parameter][name]
            assert found.marked
            assert found is not wanted
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    assert again.state[model.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_plain_state_is_loaded_too(name: str) -> None:
    """Checkpoints of earlier versions hold the state of torch's or bitsandbytes' own class."""
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    tensorwise = stepped(model, name=name)
    plain = type(tensorwise.inner)(model.parameters(), lr=1e-3)
    plain.step()
    again = built(model, 1e-3, name=name)
    one_group = plain.state_dict() | {"param_groups": again.state_dict()["param_groups"]}
    again.load_state_dict(one_group)
    again.step()
    first, second = tensorwise.state[model.weight], again.state[model.weight]
    assert first.keys() <= second.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            assert second[key].dtype == value.dtype, key


def test_the_state_of_other_weights_is_refused() -> None:
    saved = stepped(torch.nn.Linear(64, 64), name="adamw_8bit").state_dict()
    other = built(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2)), 1e-3, name="adamw_8bit")
    with pytest.raises(ValueError, match="other sizes"):
        other.load_state_dict(saved)


# ---------------------------------------------------------------- two ranks

RANK = """
import sys
from pathlib import Path
import accelerate.utils
import torch
import tiny
from vlmtune.cli.main import leave

path, view, out = Path(sys.argv[1]), sys.argv[2] == "True", Path(sys.argv[3])
asked = accelerate.utils.DistributedDataParallelKwargs

def kwargs(**options):
    assert options["gradient_as_bucket_view"]
    return asked(**{**options, "gradient_as_bucket_view": view})

accelerate.utils.DistributedDataParallelKwargs = kwargs
bf16 = {"model": {"dtype": "bf16"}, "precision": "bf16"}
config = tiny.config(path, batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-4, **bf16)
run = tiny.assemble(config, tiny.records(24, per_image=3)).fit()
assert run.prepared.gradient_as_bucket_view == view
torch.save({"losses": run.losses, "weights": run.weights()}, out / f"{view}_{run.engine.process_index}.pt")
leave(0)
"""


@pytest.mark.slow
def test_ranks_keep_equal_weights_with_and_without_views_of_the_buckets(folder: Path, tmp_path: Path) -> None:
    """A rank that rounded otherwise would train another model; gradients as views of DDP's buckets are the same."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for view in (True, False):
        words = [*torchrun, str(tmp_path / "rank.py"), str(folder), str(view), str(tmp_path)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    first, *others = [torch.load(tmp_path / f"{view}_{rank}.pt") for view in (True, False) for rank in (0, 1)]
    for other in others:
        assert other["losses"] == first["losses"]
        assert all(torch.equal(tensor, first["weights"][name]) for name, tensor in other["weights"].items())
