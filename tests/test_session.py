"""What runs of one process leave each other, and what a launcher says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate import Accelerator

import tiny
from vlmtune import commands
from vlmtune.config.schema import TrackerConfig, home
from vlmtune.errors import EXTRAS, ConfigError, to_install
from vlmtune.launch import session
from vlmtune.launch.world import World
from vlmtune.record import tracking


def test_two_runs_of_one_process_may_differ_in_precision() -> None:
    """Accelerate would refuse the second."""
    found = [session.engine(tiny.config(None, precision=name)).mixed_precision for name in ("fp32", "bf16", "fp32")]
    assert found == ["no", "bf16", "no"]


def test_a_loop_of_the_caller_that_was_left_half_way_decides_nothing() -> None:
    """Accelerate's optimizers leave a step out while gradients are not in sync, in every Accelerator of the process."""
    Accelerator(cpu=True).sync_gradients = False
    assert session.engine(tiny.config(None)).sync_gradients


def test_the_world_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    alone = World.from_environment()
    assert (alone, alone.is_main, alone.is_alone) == (World(), True, True)
    given = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    given |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(rank=9, processes=16, processes_here=8, address="node0", port=29500)
    assert (world.is_main, world.is_alone) == (False, False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE=two: must be a number"):
        World.from_environment()


RANKS_THAT_END = """
import torch
from accelerate import Accelerator
from vlmtune.launch import ranks
from vlmtune.launch.world import World
with ranks.closed_at_exit(World.from_environment()):
    engine = Accelerator(cpu=True)
    model = engine.prepare(torch.nn.Linear(8, 8))
    for _ in range(20):
        model(torch.randn(2, 8)).sum().backward()
        engine.reduce(torch.ones(1), "sum")
"""


@pytest.mark.slow
def test_ranks_end_without_an_abort(tmp_path: Path) -> None:
    """Left alone, such a script ended in SIGABRT in 6 of 10 starts."""
    (tmp_path / "job.py").write_text(RANKS_THAT_END)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "job.py")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


BUFFERS = """
import json, os, sys, torch
from vlmtune.launch import ranks, session
from vlmtune.launch.world import World
from vlmtune.training.snapshot import saved_buffers
import tiny

class Scaled(torch.nn.Linear):  # with a buffer that is made, not saved, as rotary frequencies are
    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
    def forward(self, x):
        return super().forward(x) * self.scale

def trained(model, same_buffers):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped, optimizer = session.prepared(model, optimizer, engine, sharded=False, same_buffers=same_buffers)
    own = torch.Generator().manual_seed(engine.process_index)
    for step in range(4):
        x = torch.randn(8, 4, generator=own) if step < 3 else torch.ones(8, 4)
        wrapped(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {**dict(model.named_parameters()), **saved_buffers(model)}
    return {name: tensor.tolist() for name, tensor in kept.items()}

with ranks.closed_at_exit(World.from_environment()):
    engine = session.engine(tiny.config(None))
    found = {}
    for same in (True, False):
        torch.manual_seed(0)
        found[f"plain {same}"] = trained(Scaled(), same)
        torch.manual_seed(0)
        found[f"norm {same}"] = trained(torch.nn.Sequential(Scaled(), torch.nn.BatchNorm1d(4)), same)
    with open(f"{sys.argv[1]}/{engine.process_index}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.slow
def test_buffers_that_training_leaves_alone_need_not_be_sent(tmp_path: Path) -> None:
    """Two ranks train the same weights either way, but a batch norm's averages stay the same only if they are sent."""
    (tmp_path / "job.py").write_text(BUFFERS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, str(tmp_path / "job.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["plain True"] == second["plain True"] == first["plain False"] == second["plain False"]
    assert first["norm False"] == second["norm False"]
    assert first["norm True"] != second["norm True"]


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("/somewhere/bin/vlmtune", "vlmtune predict"),
        ("/somewhere/train.py", "vlmtune predict"),  # somebody's own
        (f"{commands.PACKAGE}/__main__.py", "python -m vlmtune predict"),
        (f"{commands.PACKAGE.parent}/train.py", f"python {commands.PACKAGE.parent}/predict.py"),
    ],
)
def test_commands_are_printed_as_the_user_types_them(monkeypatch: pytest.MonkeyPatch, started: str, typed: str) -> None:
    monkeypatch.setattr(sys, "argv", [started, "a=1"])
    assert commands.typed("predict") == typed


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((home() / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in declared[extra])
    assert to_install("datasets") == "pip install 'vlmtune[hub]'"
    assert to_install("timm") == "pip install timm"
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracker=tensorboard needs the package tensorboard: pip install 'vlmtune"):
        tracking.check(TrackerConfig(name="tensorboard"))


BAR = """
import logging
from vlmtune import display
with display.logging_to(None), display.bar("training", 2) as advance:
    for _ in range(2):
        advance(1, note="loss 1.0")
        logging.getLogger("vlmtune").warning("said beside it")
"""


def test_a_bar_on_a_terminal_ends() -> None:
    """Rich replaces standard error by a proxy that writes to our console, which must not write to the proxy again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", BAR], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.count("said beside it") == 2
    assert "2/2" in done.stderr
