"""SIGKILL inside the saves of whole runs, and at random moments of them: each is gone on with, and ends as the straight
run did, bit for bit.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny
import vlmtune

pytestmark = pytest.mark.slow

PROGRAM = """
import os, signal, sys; sys.path.insert(0, "src")
name, left = sys.argv[1], int(sys.argv[2])
real = getattr(os, name)
def call(path, *args, **options):
    global left
    left -= "checkpoints" in str(path) or "model" in str(path) or name == "fsync"
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *args, **options)
setattr(os, name, call)
import vlmtune; vlmtune.train(sys.argv[3:])
"""
PLACES = [("rename", 1), ("rename", 2), ("rename", 5), ("fsync", 5), ("fsync", 20), ("fsync", 33), ("rename", 11)]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Callable[..., Any]:
    """22 rows in steps of 4, so that epochs end between checkpoints; features are kept, as is the default on a CPU."""
    rows = tmp_path_factory.mktemp("rows")
    table = tiny.write_csv(rows, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(22)], per_image=2)

    def make(folder: Path, *more: str) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", *more]
        data = ["data=csv", f"data.train={table}", "trainer.batch_size=4", "trainer.max_steps=9"]
        return [*model, *data, "trainer.save_every=1", "trainer.learning_rate=1e-2", f"hydra.run.dir={folder}"]

    return make


@pytest.fixture(scope="module", params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> list[str]:
    return {"lora": ["adapter.lora_dropout=0.2"], "full": ["adapter=none", "model.freeze=[vision,projector]"]}[
        request.param
    ]


@pytest.fixture(scope="module")
def straight(kind: list[str], overrides: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    vlmtune.train(overrides(folder, *kind))
    return folder


def weights(folder: Path) -> dict[str, Any]:
    return load_file(next((folder / "model").glob("*.safetensors")))


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def assert_equal(folder: Path, straight: Path) -> None:
    found, wanted = weights(folder), weights(straight)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(wanted[key]) for key in wanted)
    assert losses(folder) == losses(straight)
    assert not [path for path in folder.rglob(".*") if path.name not in (".lock", ".hydra")]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_killed_run_ends_as_the_straight_one(
    straight: Path, kind: list[str], overrides: Callable[..., Any], tmp_path: Path, name: str, place: int
) -> None:
    folder = tmp_path / "run"
    words = overrides(folder, *kind)
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, str(place), *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    result = vlmtune.train([*words, "resume=auto"])
    assert (result["status"], result["steps"]) == ("completed", 9)
    assert_equal(folder, straight)


RUNS, KILLS = 3, 4


def test_runs_killed_at_random_end_as_the_straight_one(
    straight: Path, kind: list[str], overrides: Callable[..., Any], tmp_path: Path
) -> None:
    """While it loads, trains, saves, evaluates or finishes: each run is killed some times and gone on with."""
    chance, began = random.Random(0), time.monotonic()
    assert start(overrides(tmp_path / "whole", *kind)).wait() == 0
    seconds = time.monotonic() - began
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        for kill in range(KILLS + 1):
            process = start([*overrides(folder, *kind), "resume=auto"])
            if kill < KILLS:
                time.sleep(chance.uniform(0.1, 1.1) * seconds)
                process.kill()
            assert process.wait() in ((0, -signal.SIGKILL) if kill < KILLS else (0,))
        assert_equal(folder, straight)


def start(words: list[str]) -> subprocess.Popen[bytes]:
    program = [sys.executable, "src/train.py", *words]
    return subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
